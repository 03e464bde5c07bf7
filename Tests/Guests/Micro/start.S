// Start code of the micro guests: from either boot protocol to C code at CPL 3.
//
// Two ways in, one way on:
//   pvh_start       32-bit protected mode, EBX = hvm_start_info (the ELF note below names it)
//   linux_start64   64-bit, RSI = zero page, at image + 0x200 (what a bzImage loader jumps to)
// Both stamp the TSC, take our own page table, GDT, TSS and IDT, and drop to CPL 3 in `micro_main`. All tables are
// assembled into the image: on a KVM without hardware virtualization each CPL 0 instruction is emulated and costs about
// a microsecond, so loops that fill tables would be the slowest part of the start. There 64-bit CPL 3 code runs
// natively, so everything else happens there: every page is a user page, and the TSS I/O bitmap opens every port.
//
// Everything of this file lies in one section, linked at IMAGE_BASE, so that addresses split over descriptor fields are
// assembly-time constants (the low half of an address is its distance from the base).

#define IMAGE_BASE 0x100000
#define TRAMPOLINE 0x10000

#define KERNEL_CODE 0x08
#define KERNEL_DATA 0x10
#define KERNEL_CODE32 0x18
#define USER_DATA 0x23
#define USER_CODE 0x2b
#define FIRST_TSS 0x40

#define ADDRESS(symbol) (IMAGE_BASE + (symbol) - image)

        .section .start, "awx", @progbits
image:

// ---------------------------------------------------------------------------------------------------- PVH, 32-bit
        .code32
        .globl pvh_start
pvh_start:
        rdtsc
        movl %eax, ADDRESS(first_tsc)
        movl %edx, ADDRESS(first_tsc) + 4
        movl %ebx, ADDRESS(boot_pointer)
        movl $1, ADDRESS(boot_path)
        lgdt ADDRESS(gdt_register)
        movl $ADDRESS(common_start), %edi
// EDI = 64-bit continuation. Shared with the application processors.
enter_long_mode:
        movl $0x20, %eax                // CR4.PAE
        movl %eax, %cr4
        movl $ADDRESS(pml4), %eax
        movl %eax, %cr3
        movl $0xc0000080, %ecx          // EFER.LME
        movl $0x100, %eax
        xorl %edx, %edx
        wrmsr
        movl $0x80000011, %eax          // CR0.PG | ET | PE; WP off: nothing here is read-only
        movl %eax, %cr0
        ljmpl $KERNEL_CODE, $ADDRESS(long_mode)
        .code64
long_mode:
        jmp *%rdi

// ------------------------------------------------------------------------------------- 64-bit Linux boot protocol
        .org image + 0x200
        .globl linux_start64
linux_start64:
        rdtsc
        movl %eax, ADDRESS(first_tsc)
        movl %edx, ADDRESS(first_tsc) + 4
        movq %rsi, ADDRESS(boot_pointer)
        movl $2, ADDRESS(boot_path)
        movl $ADDRESS(pml4), %eax
        movq %rax, %cr3
        lgdt ADDRESS(gdt_register)
        // fall through: the loader's CS is 64-bit code, and iretq below loads the selectors that matter

common_start:
        movl $ADDRESS(boot_stack_top), %esp
        lidt ADDRESS(idt_register)
        movl $FIRST_TSS, %eax
        ltr %ax
        pushq $USER_DATA
        pushq $user_stack_top
        pushq $0x2                      // interrupts off until a test asks for them
        pushq $USER_CODE
        pushq $micro_main
        iretq

// ------------------------------------------------------------------- application processors (copied below 1 MiB)
        .code16
        .balign 16
        .globl ap_trampoline, ap_trampoline_end
ap_trampoline:
        cli
        movw %cs, %ax
        movw %ax, %ds
        lgdtl (ap_gdt_register - ap_trampoline)
        movl $0x11, %eax                // CR0.PE | ET
        movl %eax, %cr0
        ljmpl $KERNEL_CODE32, $ADDRESS(ap_start32)
        .balign 4
ap_gdt_register:
        .word gdt_end - gdt - 1
        .long ADDRESS(gdt)
ap_trampoline_end:

        .code32
ap_start32:
        movl $KERNEL_DATA, %eax
        movl %eax, %ds
        movl %eax, %ss
        movl $ADDRESS(ap_start64), %edi
        jmp enter_long_mode
        .code64
ap_start64:
        movl $1, %edi
        lock xaddl %edi, ADDRESS(ap_next)       // EDI = index of this processor, 1 and up
        cmpl $MAXIMUM_CPUS, %edi
        jae 1f
        // One kernel stack page and one user stack page each, behind one another, from ap_stacks.
        movl %edi, %eax
        shll $13, %eax
        addq ADDRESS(ap_stacks), %rax           // start of this processor's two pages
        leaq 4096(%rax), %rsp                   // kernel stack while here; the TSS names the same one
        addq $8192, %rax
        lgdt ADDRESS(gdt_register)
        lidt ADDRESS(idt_register)
        movl %edi, %ecx
        shll $4, %ecx
        addl $FIRST_TSS, %ecx
        ltr %cx
        pushq $USER_DATA
        pushq %rax
        pushq $0x2
        pushq $USER_CODE
        pushq $ap_main
        iretq
1:      cli
        hlt
        jmp 1b

// ---------------------------------------------------------------------------------------------- traps, CPL 3 -> 0
// int3 is the gate into CPL 0: RDI = function, RSI, RDX, RCX = arguments, result in RAX; RCX and RDX are clobbered.
        .balign 16
gate:
        cmpl $0, %edi
        je gate_rdmsr
        cmpl $1, %edi
        je gate_wrmsr
        cmpl $2, %edi
        je gate_halt
        cmpl $3, %edi
        je gate_interrupts
        cmpl $4, %edi
        je gate_cpuid
        cmpl $5, %edi
        je gate_triple_fault
gate_park:
        cli
        hlt
        jmp gate_park
gate_rdmsr:
        movl %esi, %ecx
        rdmsr
        shlq $32, %rdx
        orq %rdx, %rax
        iretq
gate_wrmsr:
        movl %esi, %ecx
        movl %edx, %eax
        shrq $32, %rdx
        wrmsr
        iretq
gate_halt:                              // returns after one interrupt; "sti" shields the hlt, so none is lost
        sti
        hlt
        cli
        iretq
gate_interrupts:                        // RSI = 1 on, 0 off
        shll $9, %esi
        andq $~0x200, 16(%rsp)
        orq %rsi, 16(%rsp)
        iretq
gate_cpuid:                             // RSI = leaf, RDX = sub-leaf, R8 = u32[4]
        movl %esi, %eax
        movl %edx, %ecx
        pushq %rbx
        cpuid
        movl %eax, (%r8)
        movl %ebx, 4(%r8)
        movl %ecx, 8(%r8)
        movl %edx, 12(%r8)
        popq %rbx
        iretq
gate_triple_fault:                      // no IDT: the next fault cannot be delivered, nor the double fault after it
        lidt ADDRESS(empty_register)
        ud2

// Interrupts: stamp the TSC, count, EOI.
interrupt:
        pushq %rax
        pushq %rdx
        pushq %rcx
        rdtsc
        movl 24(%rsp), %ecx             // vector
        movl %eax, ADDRESS(interrupt_tsc)(, %rcx, 8)
        movl %edx, ADDRESS(interrupt_tsc) + 4(, %rcx, 8)
        lock incl ADDRESS(interrupt_count)(, %rcx, 4)
        cmpl $0, ADDRESS(x2apic)
        jne 1f
        movl $0xfee000b0, %eax
        movl $0, (%rax)
        jmp 2f
1:      movl $0x80b, %ecx
        xorl %eax, %eax
        xorl %edx, %edx
        wrmsr
2:      popq %rcx
        popq %rdx
        popq %rax
        addq $8, %rsp
        iretq

// Exceptions: go on at CPL 3 in `exception_report(vector, error, rip, cr2)`, which prints and ends the run.
exception:
        popq %rdi
        popq %rsi
        movq (%rsp), %rdx
        movq %cr2, %rcx
        pushq $USER_DATA
        pushq $user_stack_top
        pushq $0x2
        pushq $USER_CODE
        pushq $exception_report
        iretq

        .balign 16
stubs:                                  // 16 bytes per vector
        .set vector, 0
        .rept 256
        .balign 16
        .if vector < 32
        .if !((vector == 8) || (vector >= 10 && vector <= 14) || (vector == 17) || (vector == 21))
        pushq $0                        // where the processor pushes no error code
        .endif
        pushq $vector
        jmp exception
        .else
        .byte 0x68                      // pushq imm32: one length for all vectors
        .long vector
        jmp interrupt
        .endif
        .set vector, vector + 1
        .endr

// -------------------------------------------------------------------------------------------------------- tables
        .macro idt_gate target, dpl
        .word (\target - image) & 0xffff
        .word KERNEL_CODE
        .word 0x8e00 | (\dpl << 13)
        .word (IMAGE_BASE >> 16) + ((\target - image) >> 16)
        .quad 0
        .endm

        .balign 16
idt:
        .set vector, 0
        .rept 256
        .if vector == 3
        idt_gate gate, 3
        .else
        idt_gate (stubs + 16 * vector), 0
        .endif
        .set vector, vector + 1
        .endr
idt_register:
        .word . - idt - 1
        .quad ADDRESS(idt)
empty_register:
        .word 0
        .quad 0

// One TSS descriptor per processor; those of the application processors are written by `smp` before it starts them.
        .balign 16
        .globl gdt
gdt:
        .quad 0
        .quad 0x00af9b000000ffff        // 0x08 64-bit code
        .quad 0x00cf93000000ffff        // 0x10 data
        .quad 0x00cf9b000000ffff        // 0x18 32-bit code
        .quad 0x00cff3000000ffff        // 0x20 user data
        .quad 0x00affb000000ffff        // 0x28 user 64-bit code
        .quad 0, 0
        .word tss_end - tss - 1, (tss - image) & 0xffff         // 0x40 TSS of the boot processor
        .byte (IMAGE_BASE >> 16) + ((tss - image) >> 16), 0x89, 0, 0
        .quad 0
        .fill 2 * (MAXIMUM_CPUS - 1), 8, 0
gdt_end:
gdt_register:
        .word gdt_end - gdt - 1
        .quad ADDRESS(gdt)

        .balign 16
tss:
        .long 0
        .quad ADDRESS(boot_stack_top)   // RSP0
        .fill 88, 1, 0
        .word 0, io_bitmap - tss        // offset 102
io_bitmap:
        .fill 8192, 1, 0                // every port open
        .byte 0xff
tss_end:

// Identity map of [0, 4 GiB) by 2 MiB pages: present, writable, user, accessed, dirty. `map` in cpu.c adds what lies above.
        .balign 4096
        .globl pml4
pml4:   .quad ADDRESS(pdpt) + 0x67
        .fill 511, 8, 0
pdpt:   .quad ADDRESS(pd) + 0x67, ADDRESS(pd) + 0x1067, ADDRESS(pd) + 0x2067, ADDRESS(pd) + 0x3067
        .fill 508, 8, 0
pd:
        .set page, 0
        .rept 2048
        .quad (page << 21) + 0xe7
        .set page, page + 1
        .endr

// ------------------------------------------------------------------------------- words shared with the C code
        .globl first_tsc, boot_pointer, boot_path, x2apic, ap_next, ap_stacks
        .globl interrupt_tsc, interrupt_count
first_tsc:      .quad 0                 // at the first instruction
boot_pointer:   .quad 0
ap_stacks:      .quad 0
boot_path:      .long 0                 // 1 PVH, 2 64-bit Linux
x2apic:         .long 0
ap_next:        .long 1
                .balign 8
interrupt_tsc:  .fill 256, 8, 0
interrupt_count: .fill 256, 4, 0
        .fill 1024, 1, 0
boot_stack_top:

// The note that makes the ELF a PVH kernel: name "Xen", type 18 = 32-bit physical entry point.
        .section .note.Xen, "a", @note
        .balign 4
        .long 4, 4, 18
        .asciz "Xen"
        .long pvh_start
