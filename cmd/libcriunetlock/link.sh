#!/bin/sh
# Links the library: the C compiler, after the one name of Go's runtime that library.c
# needs has been made known outside of Go's own object.
set -e
for f; do
	case $f in
	*/go.o) objcopy --globalize-symbol=runtime.sigtable "$f" ;;
	esac
done
exec "${CC:-gcc}" "$@"
