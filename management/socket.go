package management

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
)

// listenUnix listens on a Unix socket that its owner and group may connect to. It makes the socket's folder when only
// that is missing, and replaces a socket that nobody listens on any more. Closing the listener removes the socket.
func listenUnix(path string) (net.Listener, error) {
	dir := filepath.Dir(path)
	switch err := os.Mkdir(dir, 0o755); {
	case errors.Is(err, fs.ErrExist):
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%s has no folder to be in: make %s, or configure another management.socket", path, filepath.Dir(dir))
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("this user may not make %s, which %s needs: make it, or configure another management.socket", dir, path)
	case err != nil:
		return nil, fmt.Errorf("making %s: %w", dir, err)
	}
	ln, err := bindUnix(path)
	if errors.Is(err, syscall.EADDRINUSE) {
		if err := removeStale(path); err != nil {
			return nil, err
		}
		ln, err = bindUnix(path)
	}
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("this user may not make %s: configure another management.socket", path)
	}
	return ln, err
}

// removeStale removes a socket that its server has left behind.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s is there and not a socket: move it away, or configure another management.socket", path)
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		c.Close()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("another server has %s: stop it, or configure another management.socket", path)
	}
	return os.Remove(path)
}

// bindUnix makes the socket. Linux gives a Unix socket's file the mode that its descriptor has at bind, less the umask:
// set before, so that nobody else connects between, and again after, so that the umask does not shut the group out.
func bindUnix(path string) (net.Listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if e := c.Control(func(fd uintptr) { err = syscall.Fchmod(int(fd), 0o660) }); e != nil {
			return e
		}
		return err
	}}
	ln, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o660); err != nil {
		ln.Close()
		return nil, err
	}
	return ln, nil
}
