#include "textflag.h"

// func entry()
TEXT ·entry(SB), NOSPLIT|NOFRAME|TOPFRAME, $0
	MOVQ SP, ·stack(SB)
	SUBQ $256, SP
	ANDQ $~63, SP
	XORPS X15, X15
	LEAQ ·noG(SB), R14
	MOVQ ·first(SB), DX
	MOVQ (DX), AX
	CALL AX
	MOVQ ·stack(SB), SP
	JMP _rt0_amd64_linux(SB)
