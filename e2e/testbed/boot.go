package testbed

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// BootTools are the programs of the machine that Boot needs.
var BootTools = []string{"qemu-system-x86_64", "mkfs.ext4"}

// BootDir is where a booted root sees the folder it was booted with.
const BootDir = "/run/boot"

// bootScript is the first process of a booted root. It runs the folder's script called run, whose
// output and exit status go out by the second serial line, and turns the machine off.
const (
	bootScript = "etc/criu-netlock-boot"
	bootExit   = "criu-netlock-boot: exit "
	boot       = `export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts
ln -sf /proc/self/fd /dev/fd
for i in 0/stdin 1/stdout 2/stderr; do ln -sf /proc/self/fd/${i%/*} /dev/${i#*/}; done
mount -t tmpfs tmpfs /tmp
mount -t tmpfs -o mode=755 tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
ip link set lo up
mkdir ` + BootDir + `
mount -t ext4 /dev/vdb ` + BootDir + `
cd ` + BootDir + `
sh ./run </dev/null >/dev/ttyS1 2>&1
echo "` + bootExit + `$?" >/dev/ttyS1
echo o >/proc/sysrq-trigger
sleep 60
`
)

// Boot boots the kernel of a root in a virtual machine of its own, with a copy of the root and of
// folder, and has it run the script called run in the folder, what that prints going to out. No
// part of the machine's own is in it: its processor is emulated, because where the tests run a
// hypervisor mostly cannot, and it has no network. It fails if the script does.
func (r *Root) Boot(ctx context.Context, folder string, out io.Writer) error {
	tmp, err := os.MkdirTemp("", "criu-netlock-boot-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	rootDisk, folderDisk, console := filepath.Join(tmp, "root"), filepath.Join(tmp, "folder"), filepath.Join(tmp, "console")
	for _, d := range []struct{ from, disk, size string }{{r.dir, rootDisk, "1G"}, {folder, folderDisk, "512M"}} {
		// A file with holes; what is not written takes no room.
		if b, err := exec.CommandContext(ctx, "mkfs.ext4", "-q", "-d", d.from, d.disk, d.size).CombinedOutput(); err != nil {
			return fmt.Errorf("mkfs.ext4 of %s: %w", d.from, errOutput(err, b))
		}
	}
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "2048", "-smp", "2",
		"-nodefaults", "-display", "none", "-no-reboot",
		"-kernel", filepath.Join(r.dir, "vmlinuz"), "-initrd", filepath.Join(r.dir, "initrd.img"),
		"-append", "console=ttyS0 panic=-1 quiet root=/dev/vda rw init=/bin/sh -- /"+bootScript,
		"-drive", "if=virtio,format=raw,file="+rootDisk, "-drive", "if=virtio,format=raw,file="+folderDisk,
		"-serial", "file:"+console, "-serial", "stdio")
	cmd.WaitDelay = 5 * time.Second
	// It is to end with us, however that is.
	runtime.LockOSThread() // whose end the kernel means
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	var said strings.Builder
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		return err
	}
	status := -1
	lines := bufio.NewScanner(pipe)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := strings.TrimSuffix(lines.Text(), "\r")
		if code, ok := strings.CutPrefix(line, bootExit); ok {
			if status, err = strconv.Atoi(code); err != nil {
				status = -1
			}
			continue
		}
		fmt.Fprintln(out, line)
	}
	_, _ = io.Copy(io.Discard, pipe) // a line that is too long has ended the reading
	err = errors.Join(lines.Err(), cmd.Wait(), context.Cause(ctx))
	if status > 0 {
		return fmt.Errorf("the script in the virtual machine: exit status %d", status)
	}
	if status < 0 {
		err = errors.Join(err, errors.New("no exit status"))
	}
	if err != nil {
		log, _ := os.ReadFile(console)
		return fmt.Errorf("the virtual machine: %w", errOutput(err, []byte(said.String()+string(log))))
	}
	return nil
}
