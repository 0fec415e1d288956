package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func runForTest(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(t.Context(), args, strings.NewReader(""), &out, &errs)
	return status, out.String(), errs.String()
}

func TestCommandLine(t *testing.T) {
	for _, test := range []struct {
		args   string
		status int
		stderr string
	}{
		{"", exitOK, ""},
		{"--version", exitOK, ""},
		{"check --help", exitOK, ""},
		{"chek", exitUsage, "kvof: unknown command \"chek\": did you mean check? (see kvof --help)\n"},
		{"--nope", exitUsage, "kvof: unknown flag: --nope (see kvof --help)\n"},
		{"check", exitUsage, "kvof: requires at least 1 arg(s), only received 0 (see kvof check --help)\n"},
		{"check /nowhere/kvof.toml", exitFailure, "no configuration file /nowhere/kvof.toml\n"},
	} {
		t.Run(test.args, func(t *testing.T) {
			status, stdout, stderr := runForTest(t, strings.Fields(test.args)...)
			if status != test.status || stderr != test.stderr {
				t.Errorf("exit status %d, stderr %q; want %d, %q", status, stderr, test.status, test.stderr)
			}
			if (stdout == "") == (status == exitOK) {
				t.Errorf("stdout is %q", stdout)
			}
		})
	}
}

func TestCheckReportsEveryFile(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.toml")
	if err := os.WriteFile(bad, []byte("log_levl = \"info\"\n[[listener]]\naddress = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	status, stdout, stderr := runForTest(t, "check", bad, "../../configs/tenants.toml")
	wantErr := bad + ":1: unknown key \"log_levl\": did you mean \"log_level\"?\n" +
		bad + ":3: listener.address: expected a string, found an integer\n"
	wantOut := "../../configs/tenants.toml: ok: 2 subsystems, 3 namespaces, I/O on 0.0.0.0:4420, discovery on 0.0.0.0:8009\n"
	if status != exitFailure || stdout != wantOut || stderr != wantErr {
		t.Errorf("exit status %d\nstdout %s\nstderr %s", status, stdout, stderr)
	}
}
