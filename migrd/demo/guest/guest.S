# The guest of the demo and the tests: it dirties pages at a chosen pace and pattern, checks
# each page it comes back to, and counts aloud on COM1.
#
# Loaded at 0x8000 by rom.S, goes to long mode, identity-maps 16 GiB, no firmware beneath it.
# migrd/demo/image.py writes the parameters; migrd/demo/proof.py predicts every byte of memory
# from them and from the statistics page, so nothing here may leave a trace it cannot predict:
#   - accessed and dirty bits are set beforehand in GDT and page tables: the CPU changes nothing;
#   - the statistics have a page of their own: code and data in one page make TCG crawl;
#   - the stack stays within its last 128 bytes.
#
# Memory:  0x5f80 stack | 0x6000 statistics | 0x8000 this code | 0xa000 IDT | 0x10000 page tables
#          p_base.. working set, then cold pages
#
# A visit: take the next page of a cursor, see that its first word is the number of earlier
# visits and its second the page's own signature, then count that word up. A cursor visits each
# of its pages once per generation, so the count is known without a table: a page that is lost,
# stale or swapped is seen here. There are two cursors: the first p_spot pages (the hot spot)
# get p_share of 100 visits, the other pages get the rest. In "random" order each generation is
# another permutation: a full-period LCG over the next power of two, its bits mixed, and the
# numbers outside the region left out.
.intel_syntax noprefix
.set STATS, 0x6000
.set SPOT,  STATS+0x80           # the two cursors
.set REST,  STATS+0xC0
.set IDT,   0xA000
.set PT,    0x10000
.set NGIB,  16
.set KMUL,  0x9E3779B97F4A7C15
.set LCGA,  6364136223846793005
.set LCGC,  1442695040888963407
.set RANDOM, 4                   # bit of p_flags
# statistics                       cursor
.set S_MAGIC, STATS+0x00;          .set C_VISITS, 0x00  # the one word that says how far it is
.set S_STAGE, STATS+0x08;          .set C_PAGES,  0x08
.set S_FILLED, STATS+0x10;         .set C_FIRST,  0x10
.set S_BEATS, STATS+0x18;          .set C_GEN,    0x18
.set S_ERRORS, STATS+0x20;         .set C_INDEX,  0x20
.set S_BADPAGE, STATS+0x28;        .set C_X,      0x28
.set S_TICKS, STATS+0x30;          .set C_ADD,    0x30
.set S_TURN, STATS+0x38;           .set C_MASK,   0x38
.section .text
.code16
.globl _start
_start:
        jmp     start16
.org 0x10
p_magic:  .ascii "MIGRDPR2"      # 0x10
p_base:   .quad 0x1000000        # 0x18 first byte of the working set
p_hot:    .quad 4096             # 0x20 pages of the working set
p_cold:   .quad 0                # 0x28 pages after it, filled once and never visited
p_lowend: .quad 0xC0000000       # 0x30 end of RAM below 4 GiB (then on from 4 GiB)
p_ppt:    .quad 100              # 0x38 pages per tick
p_reload: .quad 1193             # 0x40 PIT reload (1193: 1 kHz)
p_hbt:    .quad 50               # 0x48 ticks per heartbeat
p_flags:  .quad 0                # 0x50 bit 0 noise, bit 1 free-run, bit 2 random order
p_spot:   .quad 0                # 0x58 pages of the hot spot
p_share:  .quad 0                # 0x60 visits of 100 that go to the hot spot
p_on:     .quad 1                # 0x68 burst: ticks of work ...
p_period: .quad 1                # 0x70 ... out of each so many
p_mask_spot: .quad 0             # 0x78 power of two >= pages, minus 1
p_mask_rest: .quad 0             # 0x80
p_shift_spot: .quad 0            # 0x88 half the bits of the mask, at least 1
p_shift_rest: .quad 0            # 0x90
p_resets: .quad 0                # 0x98 heartbeats after which it resets the machine, 0: never
.org 0x100
start16:
        cli
        cld
        xor     ax, ax
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     sp, 0x6000
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
        mov     esp, 0x6000
        mov     edi, PT
        xor     eax, eax
        mov     ecx, (2+NGIB)*1024
        rep stosd
        mov     edi, IDT
        mov     ecx, 1024
        rep stosd
        mov     edi, STATS
        mov     ecx, 1024
        rep stosd
        mov     dword ptr [PT], PT+0x1023        # present, writable, accessed
        mov     edi, PT+0x1000
        mov     eax, PT+0x2023
        mov     ecx, NGIB
1:      mov     [edi], eax
        add     eax, 0x1000
        add     edi, 8
        loop    1b
        mov     edi, PT+0x2000
        mov     eax, 0xe3                        # 2 MiB page, accessed and dirty too
        xor     edx, edx
        mov     ecx, NGIB*512
1:      mov     [edi], eax
        mov     [edi+4], edx
        add     eax, 0x200000
        adc     edx, 0
        add     edi, 8
        loop    1b
        mov     eax, PT
        mov     cr3, eax
        mov     eax, cr4
        or      eax, 0x20
        mov     cr4, eax
        mov     ecx, 0xC0000080
        rdmsr
        or      eax, 0x100
        wrmsr
        mov     eax, cr0
        or      eax, 0x80000000
        mov     cr0, eax
        .byte   0xea
        .long   start64
        .word   0x18
.code64
start64:
        mov     eax, 0x10
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     esp, 0x6000
        mov     edi, IDT+0x200                   # gate 0x20: irq0
        lea     eax, irq0
        mov     edx, eax
        and     eax, 0xffff
        or      eax, 0x180000
        mov     [rdi], eax
        and     edx, 0xffff0000
        or      edx, 0x8e00
        mov     [rdi+4], edx
        lidt    [idtr]
        # Without firmware nobody has let the PIC through the local APIC: LINT0 = ExtINT.
        mov     edi, 0xfee000f0
        mov     dword ptr [rdi], 0x1ff
        mov     edi, 0xfee00350
        mov     dword ptr [rdi], 0x8700
        mov     al, 0x11; out 0x20, al; out 0xa0, al     # PIC to 0x20/0x28, only IRQ 0
        mov     al, 0x20; out 0x21, al
        mov     al, 0x28; out 0xa1, al
        mov     al, 4;    out 0x21, al
        mov     al, 2;    out 0xa1, al
        mov     al, 1;    out 0x21, al; out 0xa1, al
        mov     al, 0xfe; out 0x21, al
        mov     al, 0xff; out 0xa1, al
        mov     dx, 0x3f9; xor eax, eax; out dx, al      # UART 115200 8N1, no IRQ, no FIFO
        mov     dx, 0x3fb; mov al, 0x83; out dx, al
        mov     dx, 0x3f8; mov al, 1;    out dx, al
        mov     dx, 0x3f9; xor eax, eax; out dx, al
        mov     dx, 0x3fb; mov al, 3;    out dx, al
        mov     dx, 0x3fa; xor eax, eax; out dx, al
        mov     al, 0x34; out 0x43, al                   # PIT channel 0, mode 2
        mov     rax, [p_reload]
        out     0x40, al
        mov     al, ah
        out     0x40, al
        mov     rax, 0x415453445247494d
        mov     [S_MAGIC], rax
        mov     qword ptr [S_STAGE], 1                   # filling
        mov     al, 'B'; call putc
        mov     al, 10;  call putc
        test    dword ptr [p_flags], 1
        jz      filled
        xor     ebx, ebx
        mov     rbp, [p_hot]
        add     rbp, [p_cold]
        mov     r10, LCGA
        mov     r11, LCGC
        mov     r14, KMUL
fill:   cmp     rbx, rbp
        jae     filled
        call    page_addr
        mov     rax, rbx
        imul    rax, r14                 # the page's signature is its seed
        mov     [rdi+8], rax
        mov     qword ptr [rdi], 0
        mov     ecx, 2
1:      imul    rax, r10
        add     rax, r11
        mov     rdx, rax
        shr     rdx, 32
        xor     rdx, rax
        mov     [rdi+rcx*8], rdx
        inc     ecx
        cmp     ecx, 512
        jb      1b
        inc     rbx
        mov     [S_FILLED], rbx
        jmp     fill
filled: mov     rax, [p_spot]
        mov     [SPOT+C_PAGES], rax
        mov     [REST+C_FIRST], rax
        mov     rcx, [p_hot]
        sub     rcx, rax
        mov     [REST+C_PAGES], rcx
        mov     rax, [p_mask_spot]
        mov     [SPOT+C_MASK], rax
        mov     rax, [p_mask_rest]
        mov     [REST+C_MASK], rax
        mov     r14, KMUL
        mov     r10, LCGA
        mov     ebp, SPOT
        call    seed
        mov     ebp, REST
        call    seed
        mov     qword ptr [S_STAGE], 2                   # running
        mov     al, 'F'; call putc
        mov     al, 10;  call putc
        xor     r15d, r15d               # last tick handled
        xor     r9d, r9d                 # tick of the last heartbeat
        sti
outer:
        test    dword ptr [p_flags], 2
        jnz     freerun
        cli
        mov     rax, [S_TICKS]
        cmp     rax, r15
        jne     go
        sti                              # takes effect after hlt: no tick is missed between
        hlt
        jmp     outer
freerun:
        mov     rax, [S_TICKS]
        mov     r15, rax
        mov     r13, [p_ppt]
        jmp     burst
go:     sti
        mov     r13, rax
        sub     r13, r15                 # ticks since the last turn, of which few are made up
        mov     r15, rax
        cmp     r13, 8
        jbe     1f
        mov     r13d, 8
1:      imul    r13, [p_ppt]
burst:  mov     rax, r15                 # within the working part of the period?
        xor     edx, edx
        div     qword ptr [p_period]
        cmp     rdx, [p_on]
        jae     beat
        test    r13, r13
        jz      beat
        cmp     qword ptr [p_hot], 0
        je      beat
visit:  mov     ebp, REST                # whose turn is it?
        mov     rax, [S_TURN]
        add     rax, [p_share]
        cmp     rax, 100
        jb      1f
        sub     rax, 100
        mov     ebp, SPOT
1:      mov     [S_TURN], rax
        mov     rbx, [rbp+C_INDEX]
        test    dword ptr [p_flags], RANDOM
        jz      found
        mov     rcx, [p_shift_rest]
        cmp     ebp, SPOT
        jne     1f
        mov     rcx, [p_shift_spot]
1:      mov     rax, [rbp+C_X]
        mov     rdx, [rbp+C_MASK]
2:      imul    rax, r10
        add     rax, [rbp+C_ADD]
        and     rax, rdx
        mov     rbx, rax                 # mix: the low bits of an LCG are poor
        shr     rbx, cl
        xor     rbx, rax
        imul    rbx, r14
        and     rbx, rdx
        mov     rsi, rbx
        shr     rsi, cl
        xor     rbx, rsi
        cmp     rbx, [rbp+C_PAGES]
        jae     2b                       # not a page of this region
        mov     [rbp+C_X], rax
found:  add     rbx, [rbp+C_FIRST]
        call    page_addr
        mov     r12, [rbp+C_GEN]
        mov     rcx, rbx
        imul    rcx, r14                 # signature of this page
        cmp     [rdi], r12
        jne     bad
        test    r12, r12
        jz      good
        cmp     [rdi+8], rcx
        jne     bad
good:   mov     [rdi+8], rcx
        lea     rax, [r12+1]
        mov     [rdi], rax
        mov     rax, [rbp+C_INDEX]
        inc     rax
        mov     [rbp+C_INDEX], rax
        inc     qword ptr [rbp+C_VISITS]
        cmp     rax, [rbp+C_PAGES]
        jb      1f
        mov     qword ptr [rbp+C_INDEX], 0
        inc     qword ptr [rbp+C_GEN]
        call    seed
1:      dec     r13
        jnz     visit
beat:   mov     rax, r15
        sub     rax, r9
        cmp     rax, [p_hbt]
        jb      outer
        mov     r9, r15
        inc     qword ptr [S_BEATS]
        mov     al, 'H'; call putc
        mov     rax, [S_BEATS]; call puthex
        mov     rax, [REST+C_GEN]; call puthex
        mov     rax, [S_ERRORS]; call puthex
        mov     rax, [REST+C_VISITS]
        add     rax, [SPOT+C_VISITS]
        call    puthex
        mov     rax, r15; call puthex    # not S_TICKS: those are not all worked off
        mov     al, 10; call putc
        mov     rax, [p_resets]
        test    rax, rax
        jz      outer
        cmp     [S_BEATS], rax
        jb      outer
        mov     al, 0xfe; out 0x64, al   # the keyboard controller pulls the reset line
        jmp     outer
bad:    inc     qword ptr [S_ERRORS]
        mov     [S_BADPAGE], rbx
        jmp     good

seed:                                    # rbp cursor: the permutation of its generation
        mov     rax, [rbp+C_GEN]
        inc     rax
        imul    rax, r14
        mov     rdx, rax
        shr     rdx, 29
        xor     rax, rdx
        imul    rax, r10
        mov     rdx, rax
        shr     rdx, 32
        mov     [rbp+C_X], rdx
        or      rax, 1
        mov     [rbp+C_ADD], rax
        ret
page_addr:                               # rbx page -> rdi address
        mov     rdi, rbx
        shl     rdi, 12
        add     rdi, [p_base]
        cmp     rdi, [p_lowend]
        jb      1f
        sub     rdi, [p_lowend]
        mov     rax, 0x100000000
        add     rdi, rax
1:      ret
putc:   mov     ah, al
        mov     edx, 0x3fd
1:      in      al, dx
        test    al, 0x20
        jz      1b
        mov     al, ah
        mov     edx, 0x3f8
        out     dx, al
        ret
puthex: mov     rsi, rax                 # low 32 bits
        mov     al, ' '; call putc
        mov     ecx, 8
        shl     rsi, 32
1:      rol     rsi, 4
        mov     al, sil
        and     al, 15
        cmp     al, 10
        jb      2f
        add     al, 39
2:      add     al, 48
        call    putc
        dec     ecx
        jnz     1b
        ret
irq0:   push    rax
        inc     qword ptr [S_TICKS]
        mov     al, 0x20
        out     0x20, al
        pop     rax
        iretq
.align 8
gdt:    .quad 0
        .quad 0x00cf9b000000ffff         # 08 code32, accessed
        .quad 0x00cf93000000ffff         # 10 data, accessed
        .quad 0x00af9b000000ffff         # 18 code64, accessed
gdtr:   .word 31
        .long gdt
idtr:   .word 4095
        .quad IDT
.org 0xC00
