// Wraps the flat image into a minimal bzImage: one boot sector and one setup sector that only carry the setup header,
// then the protected-mode part, whose 64-bit entry is at +0x200. Offsets and meanings: Linux boot protocol 2.15.
        .section .bzimage, "a"
file:
        .org file + 0x1f1
        .byte 1                         // setup_sects
        .word 0                         // root_flags
        .long (kernel_end - kernel + 15) / 16   // syssize
        .word 0
        .word 0xffff                    // vid_mode: normal
        .word 0
        .word 0xaa55                    // boot_flag
        .byte 0xeb, header_end - . - 1  // jump: its second byte is the end of the header
        .ascii "HdrS"
        .word 0x020f                    // version
        .org file + 0x211
        .byte 1                         // loadflags: LOADED_HIGH
        .org file + 0x214
        .long 0x100000                  // code32_start
        .org file + 0x22c
        .long 0x7fffffff                // initrd_addr_max
        .long 0x100000                  // kernel_alignment
        .byte 0, 20                     // not relocatable; min_alignment 2^20
        .word 1                         // xloadflags: KERNEL_64
        .long 2047                      // cmdline_size
        .org file + 0x258
        .quad 0x100000                  // pref_address
        .long INIT_SIZE                 // init_size: memory used from pref_address on
        .long 0
        .long 0
header_end:
        .org file + 0x400
kernel:
        .incbin FLAT_IMAGE
kernel_end:
