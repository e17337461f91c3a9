# The guest of the benchmarks: a heartbeat of one byte each millisecond, and a pace of dirtying.
#
# The whole ROM: copied to 0x8000 at reset, then 32 bit flat without paging. Each tick of the PIT
# (1 kHz) it writes the low byte of its tick count to port 0xe9 (isa-debugcon) and changes a few
# pages of its working set, which it has filled with noise at boot: zeros would cost QEMU nothing.
# Ticks are counted by the interrupt and worked off one by one, so the bytes have no gap however
# late the guest is.
#
# Memory: 0x5000 tick count | 0x5ff0 stack | 0x6000 IDT | 0x8000 this code | 16 MiB working set.
# The count has a page of its own: code and data in one page make TCG crawl.
.intel_syntax noprefix
.set TICKS, 0x5000
.set IDT, 0x6000
.set BASE, 0x1000000
.section .text
.code16
.globl _start
_start: jmp     copy
.org 0x10
p_pages: .long 16384             # 0x10 pages of the working set
p_step:  .long 15                # 0x14 pages changed per tick
copy:   cli
        cld
        mov     ax, cs
        mov     ds, ax
        xor     si, si
        xor     ax, ax
        mov     es, ax
        mov     di, 0x8000
        mov     cx, 0x200
        rep movsw
        ljmp    0, offset start16
start16:
        xor     ax, ax
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     sp, 0x5ff0
        in      al, 0x92                 # A20
        or      al, 2
        and     al, 0xfe
        out     0x92, al
        lgdtd   [gdtr]
        mov     eax, cr0
        or      al, 1
        mov     cr0, eax
        .byte   0x66, 0xea
        .long   start32
        .word   0x08
.code32
start32:
        mov     ax, 0x10
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     esp, 0x5ff0
        mov     dword ptr [TICKS], 0
        mov     edi, IDT+0x100           # gate 0x20: irq0
        mov     eax, offset irq0
        mov     edx, eax
        and     eax, 0xffff
        or      eax, 0x80000
        mov     [edi], eax
        and     edx, 0xffff0000
        or      edx, 0x8e00
        mov     [edi+4], edx
        lidt    [idtr]
        mov     dword ptr [0xfee000f0], 0x1ff    # without firmware: LINT0 = ExtINT
        mov     dword ptr [0xfee00350], 0x8700
        mov     al, 0x11; out 0x20, al; out 0xa0, al
        mov     al, 0x20; out 0x21, al
        mov     al, 0x28; out 0xa1, al
        mov     al, 4;    out 0x21, al
        mov     al, 2;    out 0xa1, al
        mov     al, 1;    out 0x21, al; out 0xa1, al
        mov     al, 0xfe; out 0x21, al           # IRQ 0 alone
        mov     al, 0xff; out 0xa1, al
        mov     edi, BASE
        mov     ecx, [p_pages]
        shl     ecx, 10                          # words of four bytes
        mov     eax, 0x2545f491
noise:  mov     edx, eax                         # xorshift32
        shl     edx, 13
        xor     eax, edx
        mov     edx, eax
        shr     edx, 17
        xor     eax, edx
        mov     edx, eax
        shl     edx, 5
        xor     eax, edx
        mov     [edi], eax
        add     edi, 4
        dec     ecx
        jnz     noise
        mov     al, 0x34; out 0x43, al           # PIT channel 0, mode 2
        mov     al, 0xa9; out 0x40, al           # 1193: 1 kHz
        mov     al, 0x04; out 0x40, al
        xor     ebx, ebx                         # ticks worked off
        xor     ebp, ebp                         # next page
        sti
wait:   cli
        cmp     ebx, [TICKS]
        jne     work
        sti                                      # takes effect after hlt: no tick is missed
        hlt
        jmp     wait
work:   sti
        inc     ebx
        mov     al, bl
        out     0xe9, al
        mov     ecx, [p_step]
        jecxz   wait
touch:  mov     edi, ebp
        shl     edi, 12
        inc     dword ptr [edi+BASE]
        inc     ebp
        cmp     ebp, [p_pages]
        jb      1f
        xor     ebp, ebp
1:      dec     ecx
        jnz     touch
        jmp     wait
irq0:   inc     dword ptr [TICKS]
        push    eax
        mov     al, 0x20
        out     0x20, al
        pop     eax
        iretd
.align 8
gdt:    .quad 0
        .quad 0x00cf9b000000ffff                 # 08 code, accessed
        .quad 0x00cf93000000ffff                 # 10 data, accessed
gdtr:   .word 23
        .long gdt
idtr:   .word 0x107
        .long IDT
.code16
.org 0xfff0
        ljmp    0xf000, 0                        # the reset vector
.org 0x10000
