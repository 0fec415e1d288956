package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"
)

// A directory is stored as a tar archive, which any other tool reads too. Files, directories and symbolic links that
// stay inside are kept, with their permission bits and times; owners are not.

// archiveTree writes a directory's archive to w and returns how many entries it has.
func archiveTree(dir string, w io.Writer) (n int, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return 0, err
	}
	defer root.Close()
	t := tar.NewWriter(w)
	err = fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == "." {
			return err
		}
		n++
		return archiveEntry(root, name, d, t)
	})
	if err != nil {
		return n, err
	}
	return n, t.Close()
}

func archiveEntry(root *os.Root, name string, d fs.DirEntry, t *tar.Writer) error {
	info, err := d.Info()
	if err != nil {
		return err
	}
	h := &tar.Header{Name: name, Mode: int64(info.Mode().Perm()), ModTime: info.ModTime().Truncate(time.Second)}
	switch info.Mode().Type() {
	case 0:
		h.Typeflag, h.Size = tar.TypeReg, info.Size()
	case fs.ModeDir:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case fs.ModeSymlink:
		h.Typeflag = tar.TypeSymlink
		if h.Linkname, err = root.Readlink(name); err != nil {
			return err
		}
		if !localLink(name, h.Linkname) {
			return fmt.Errorf("%s is a symbolic link to %s, outside the directory", name, h.Linkname)
		}
	default:
		return fmt.Errorf("%s is neither a file, a directory nor a symbolic link", name)
	}
	if err := t.WriteHeader(h); err != nil || h.Typeflag != tar.TypeReg {
		return err
	}
	f, err := root.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if n, err := io.CopyN(t, f, h.Size); err != nil {
		if err == io.EOF {
			err = fmt.Errorf("%s became shorter, %d bytes, while it was read", name, n)
		}
		return err
	}
	return nil
}

// extractTree restores an archive into dir, which is made if it is not there. Nothing is written outside it.
func extractTree(dir string, r io.Reader) (n int, err error) {
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return 0, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return 0, err
	}
	defer root.Close()
	t := tar.NewReader(r)
	var dirs []*tar.Header
	for ; ; n++ {
		h, err := t.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return n, notArchive(err)
		}
		if h.Typeflag == tar.TypeDir {
			dirs = append(dirs, h)
		}
		if err := extractEntry(root, h, t); err != nil {
			return n, fmt.Errorf("%q: %w", h.Name, err)
		}
	}
	for i := len(dirs) - 1; i >= 0; i-- { // last, since a directory may be read-only
		name := filepath.FromSlash(path.Clean(dirs[i].Name))
		if err := errors.Join(root.Chtimes(name, time.Time{}, dirs[i].ModTime), root.Chmod(name, mode(dirs[i]))); err != nil {
			return n, err
		}
	}
	_, err = io.Copy(io.Discard, r) // what pads the archive
	return n, err
}

func notArchive(err error) error {
	if errors.Is(err, tar.ErrHeader) {
		return errors.New("the value is not the archive of a directory")
	}
	return err
}

func mode(h *tar.Header) fs.FileMode { return fs.FileMode(h.Mode) & fs.ModePerm }

func extractEntry(root *os.Root, h *tar.Header, content io.Reader) error {
	name := strings.TrimSuffix(h.Name, "/")
	if !fs.ValidPath(name) || name == "." {
		return errors.New("not a path below the directory")
	}
	local := filepath.FromSlash(name)
	switch h.Typeflag {
	case tar.TypeDir:
		return root.MkdirAll(local, 0o777)
	case tar.TypeReg:
		if err := writeFile(root, local, mode(h), func(w io.Writer) error {
			_, err := io.Copy(w, content)
			return err
		}); err != nil {
			return err
		}
		return root.Chtimes(local, time.Time{}, h.ModTime)
	case tar.TypeSymlink:
		if !localLink(name, h.Linkname) {
			return errors.New("symbolic link leads out of the directory")
		}
		if err := root.Remove(local); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return root.Symlink(h.Linkname, local)
	}
	return errors.New("neither a file, a directory nor a symbolic link")
}

// localLink tells whether a symbolic link at p to target stays inside the tree.
func localLink(p, target string) bool {
	return !path.IsAbs(target) && fs.ValidPath(path.Join(path.Dir(p), target))
}
