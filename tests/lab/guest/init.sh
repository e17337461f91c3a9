#!/bin/sh
# The first process of a lab guest (tests/lab/boot.py). Its root is the machine's, read-only.
# The share brings `command`, the `python` to power off with, and in `writable` the directories
# to lay over; it takes back `up`, `log`, `status` and `dmesg`.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t debugfs debugfs /sys/kernel/debug
mkdir -p /dev/shm /dev/pts /dev/lab
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /dev/lab
share=/dev/lab/share
mkdir $share
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 share $share
echo lab >/proc/sys/kernel/hostname
ip link set lo up

# What is read there is the machine's, what is written stays in memory.
while read -r directory; do
    [ -d "$directory" ] || continue
    layer=$(mktemp -d /dev/lab/layer-XXXXXX)
    mkdir "$layer/upper" "$layer/work"
    mount -t overlay -o "lowerdir=$directory,upperdir=$layer/upper,workdir=$layer/work" \
        overlay "$directory"
done <$share/writable

cut -d' ' -f1 /proc/uptime >$share/up
sh $share/command >$share/log 2>&1 </dev/null
status=$?
dmesg >$share/dmesg
echo $status >$share/status
sync
exec "$(readlink $share/python)" -I -S -c 'import ctypes; ctypes.CDLL(None).reboot(0x4321FEDC)'
