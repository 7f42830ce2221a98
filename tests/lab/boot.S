/*
 * The boot sector of the lab's light guests: 16-bit real mode, first serial port (COM1).
 *
 * At start it prints a banner and a prompt. From then on it lives in the interrupt handler
 * of the UART and halts between interrupts, so that an idle guest takes no CPU.
 *
 *   default           every received byte is sent back as it came, all 256 values alike
 *   --defsym FLOOD=1  any received byte starts an endless numbered text; the next one stops it
 *
 * Assembled by images.py with `as --32`, linked flat to 0x7c00, where the BIOS loads it.
 */
        .code16
        .text
        .globl  _start

        .set    UART, 0x3f8             /* COM1; its interrupt is IRQ 4 */
        .set    IER, UART + 1
        .set    FCR, UART + 2
        .set    LCR, UART + 3
        .set    MCR, UART + 4
        .set    LSR, UART + 5
        .set    LSR_DATA_READY, 0x01
        .set    LSR_THR_EMPTY, 0x20
        .set    PIC_COMMAND, 0x20
        .set    PIC_MASK, 0x21
        .set    IRQ4_VECTOR, 0x0c       /* the BIOS maps IRQ 0-7 to vectors 8-15 */

        .macro  output port, value
        movw    $\port, %dx
        movb    $\value, %al
        outb    %al, %dx
        .endm

_start: cli
        cld
        ljmp    $0, $1f                 /* some BIOS start us at 07c0:0000 */
1:      xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    $0x7c00, %sp

        movw    $receive, IRQ4_VECTOR * 4
        movw    %ax, IRQ4_VECTOR * 4 + 2

        output  LCR, 0x83               /* open the divisor latch */
        output  UART, 1                 /* divisor 1: 115200 baud */
        output  IER, 0
        output  LCR, 0x03               /* 8 bits, no parity, one stop bit */
        output  FCR, 0x07               /* FIFOs on and empty; interrupt at the first byte */
        output  MCR, 0x0b               /* DTR, RTS, and OUT2, which lets the interrupt through */

        movw    $banner, %si
        call    print

        output  IER, 0x01               /* interrupt when data is received */
        inb     $PIC_MASK, %al
        andb    $0xef, %al              /* unmask IRQ 4 */
        outb    %al, $PIC_MASK

        .ifdef  FLOOD
/* `sti` takes effect after the instruction that follows it: no interrupt is missed before `hlt`. */
idle:   cli
        cmpb    $0, flooding
        jne     flood
        sti
        hlt
        jmp     idle

flood:  sti
        movw    $line, %si
        call    print
        movw    $last_digit, %di
1:      incb    (%di)                   /* count on, in decimal */
        cmpb    $'9', (%di)
        jbe     idle
        movb    $'0', (%di)
        decw    %di
        cmpw    $line, %di
        jae     1b
        jmp     idle
        .else
idle:   sti
        hlt
        jmp     idle
        .endif

/* Interrupt: take all that the FIFO holds. An edge after the last look raises a new one. */
receive:
        pushw   %ax
        pushw   %dx
1:      movw    $LSR, %dx
        inb     %dx, %al
        testb   $LSR_DATA_READY, %al
        jz      2f
        movw    $UART, %dx
        inb     %dx, %al
        .ifdef  FLOOD
        xorb    $1, flooding
        .else
        call    send
        .endif
        jmp     1b
2:      movb    $0x20, %al              /* end of interrupt */
        outb    %al, $PIC_COMMAND
        popw    %dx
        popw    %ax
        iret

/* Send the byte in %al, once the transmitter can take it. Keeps all but %dx. */
send:   pushw   %ax
        movw    $LSR, %dx
1:      inb     %dx, %al
        testb   $LSR_THR_EMPTY, %al
        jz      1b
        popw    %ax
        movw    $UART, %dx
        outb    %al, %dx
        ret

/* Send the string at %si, up to its zero. */
print:  lodsb
        testb   %al, %al
        jz      1f
        call    send
        jmp     print
1:      ret

        .ifdef  FLOOD
banner: .asciz  "flood ready\r\n> "
line:   .ascii  "0000000"
last_digit:
        .asciz  "1 the quick brown fox jumps over the lazy dog 0123456789 abcdef\r\n"
flooding:
        .byte   0
        .else
banner: .asciz  "light ready\r\n> "
        .endif

        .org    510
        .word   0xaa55                  /* marks a boot sector */
