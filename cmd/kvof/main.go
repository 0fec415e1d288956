// Command kvof serves NVMe Key Value and block namespaces over NVMe-oF, and is a host for them.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/kvof/kvof/configs"
)

// Exit statuses.
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2
)

func main() {
	// The first signal ends the context, which drains a server and stops a client; the second ends the process.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run executes one command line and returns the exit status.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newRootCommand()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	started := false // what fails before a command starts is a mistake in the command line
	root.PersistentPreRun = func(*cobra.Command, []string) { started = true }

	cmd, err := root.ExecuteContextC(ctx)
	var usage usageError
	var config configs.Errors
	switch {
	case err == nil:
		return exitOK
	case !started || errors.As(err, &usage):
		fmt.Fprintf(stderr, "kvof: %v (see %s --help)\n", err, cmd.CommandPath())
		return exitUsage
	case errors.Is(err, errReported):
	case errors.As(err, &config): // one line each, as compilers print them
		fmt.Fprintln(stderr, config)
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		fmt.Fprintln(stderr, "kvof: interrupted")
	default:
		fmt.Fprintf(stderr, "kvof: %v\n", err)
	}
	return exitFailure
}

// usageError is a mistake in the command line that a command finds itself.
type usageError struct{ error }

// errReported fails a command that has printed its errors.
var errReported = errors.New("failed")

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "kvof",
		Short:         "NVMe-oF target and host for context blocks: Key Value and block namespaces over NVMe/TCP",
		Version:       version(),
		Args:          unknownCommand,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(
		newCheckCommand(),
		newServeCommand(),
		newStatusCommand(),
		newDriveCommand(),
		newSetupCommand(),
		newDiscoverCommand(),
		newPutCommand(),
		newGetCommand(),
		newExistCommand(),
		newListCommand(),
		newDeleteCommand(),
		newSweepCommand(),
		newBenchCommand(),
		newReplayCommand(),
		newPinCommand(),
		newUnpinCommand(),
	)
	return root
}

// unknownCommand refuses arguments of the bare root, naming the nearest command.
func unknownCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	msg := fmt.Sprintf("unknown command %q", args[0])
	cmd.SuggestionsMinimumDistance = 2
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		msg += ": did you mean " + strings.Join(near, " or ") + "?"
	}
	return errors.New(msg)
}

// version is the module's version as the Go command stamped it, from the tag or commit of the checkout.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(unknown)"
}
