package early

import (
	"testing"

	"github.com/criu-netlock/criu-netlock/netlock/action"
)

func TestBusyIsTheTable(t *testing.T) {
	for _, name := range []action.Name{
		action.PreStream, action.PreDump, action.PostDump, action.PreRestore, action.PostRestore,
		action.NetworkLock, action.NetworkUnlock, action.SetupNamespaces, action.PostSetupNamespaces,
		action.PreResume, action.PostResume, action.OrphanPtsMaster, action.StatusReady, action.QueryExtFiles,
		"a-hook-to-come", "network-lock ", "NETWORK-LOCK",
	} {
		if got, want := Busy(string(name)), action.OpOf(name) != action.Nothing; got != want {
			t.Errorf("%s: busy is %v, the table says %v", name, got, want)
		}
	}
}
