#include "textflag.h"

// func entry()
TEXT ·entry(SB), NOSPLIT|NOFRAME|TOPFRAME, $0
	MOVD RSP, R0
	MOVD R0, ·stack(SB)
	SUB $256, RSP
	MOVD $·noG(SB), g
	MOVD ·first(SB), R26
	MOVD (R26), R1
	CALL (R1)
	MOVD ·stack(SB), R0
	MOVD R0, RSP
	JMP _rt0_arm64_linux(SB)
