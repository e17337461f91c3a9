"""Tests that run in a guest, on the real kernel: iommufd, VFIO, a nested QEMU.

The directory says in which of the three boots a file runs:

    guest/mock/test_*.py   no vIOMMU; the mock devices of iommufd's own selftest
    guest/vfio/test_*.py   an emulated VT-d, mtty mdevs, and NICs: an e1000e alone, two that share
                           an IOMMU group, an igb with up to eight VFs
    guest/e2e/test_*.py    mtty mdevs behind the mock IOMMU: a VFIO device with a page table that
                           tracks dirty pages; a UUID that starts with 0d0d0d0d cannot

Both 0d0d0d0d and the mock IOMMU under mtty are the lab's own (kernel/patch_tree.py). In *mock*
and *vfio* mtty is as the kernel has it: emulated, with no page table.

To run some, as root, from the checkout (the first time builds the kernel, about ten minutes):

    .venv/bin/python -m pytest -n0 tests/lab/guest/vfio/test_mtty.py    boots the tier, runs them
    .venv/bin/python -m tests.lab.boot vfio -k reset -x                 with the guest's own output

To build on: raw.py (the kernel without migrd's adapters; makes mttys, binds NICs, plays the device
that writes), nested.py (a QEMU in the guest, and what it asked of the kernel), planned.py (migrd's
facts and plan for devices, and a QEMU launched accordingly).

Each test is an ordinary test of the run it is in: collected outside, run inside, its result
brought back (outside.py). Modules are therefore imported outside too: open nothing at import
time, and let no parameter depend on the machine. In the guest (inside.py):

- root, the host's file system read-only, except what is laid over in memory: /tmp, /var/tmp, /run,
  the cache. The checkout is at its own path, and so is the environment.
- a test that is skipped counts as failed: a guest has what its tier promises.
- the kernel's log is watched: a warning or an oops fails the test that caused it.
- asyncio tests, `tmp_path`, `short_tmp_path` and `qemu_binaries["10"]` (nested, TCG) work as
  outside. Bind the NICs, make the mdevs you need, and leave them as they were.
- time runs three to ten times slower: wait for conditions, keep mapped memory at 64 to 256 MiB.
"""
