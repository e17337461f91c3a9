# Reset stub: the last 256 bytes of the 64 KiB ROM. Copies guest.S (at offset 0) to 0x8000.
.intel_syntax noprefix
.code16
.globl _start
_start: cli
        cld
        mov ax, cs
        mov ds, ax
        xor si, si
        xor ax, ax
        mov es, ax
        mov di, 0x8000
        mov cx, 0x600
        rep movsw
        ljmp 0, 0x8000
.org 0xf0
        ljmp 0xf000, 0xff00              # the reset vector
.org 0x100
