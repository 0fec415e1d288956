// Package systemd_test checks the units. It needs systemd-analyze, which Debian has in the package
// systemd, and skips without it.
package systemd_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// staged copies the units to a folder of their own, with an executable that exists here in place of the
// installed one, and runs systemd-analyze on them.
func staged(t *testing.T, args ...string) string {
	t.Helper()
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is not installed (Debian: apt install systemd)")
	}
	dir := t.TempDir()
	for _, unit := range []string{"kvof.service", "kvof.socket"} {
		data, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		data = bytes.ReplaceAll(data, []byte("/usr/bin/kvof"), []byte(self))
		if err := os.WriteFile(filepath.Join(dir, unit), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(analyze, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("systemd-analyze %v: %v\n%s", args, err, out)
	}
	return string(out)
}

func TestUnitsVerify(t *testing.T) {
	if out := staged(t, "verify", "--man=no", "./kvof.service", "./kvof.socket"); out != "" {
		t.Errorf("systemd-analyze verify says:\n%s", out)
	}
}

// A score up to 2.0 is what systemd calls OK; raw drives and the network cost most of it.
func TestServiceIsHardened(t *testing.T) {
	t.Log(staged(t, "security", "--offline=true", "--no-pager", "--threshold=20", "./kvof.service"))
}
