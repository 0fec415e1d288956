package nvmeof

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"unicode/utf8"
)

// DiscoveryNQN is the well-known NQN of every discovery subsystem (Base, NVMe Qualified Names).
const DiscoveryNQN = "nqn.2014-08.org.nvmexpress.discovery"

// MaxNQN is the longest NQN in bytes, without the terminating NUL.
const MaxNQN = 223

var nqnForm = regexp.MustCompile(`^nqn\.[0-9]{4}-(0[1-9]|1[0-2])\.[^\s:]+(:.+)?$`)

// CheckNQN reports what is wrong with an NQN, or nil. The forms are nqn.YYYY-MM.reverse.domain[:name] and
// nqn.2014-08.org.nvmexpress:uuid:UUID.
func CheckNQN(nqn string) error {
	switch {
	case nqn == "":
		return errors.New("NQN is empty")
	case len(nqn) > MaxNQN:
		return fmt.Errorf("NQN is %d bytes long, %d are allowed", len(nqn), MaxNQN)
	case !utf8.ValidString(nqn) || strings.ContainsRune(nqn, 0):
		return errors.New("NQN is not UTF-8 text")
	case !nqnForm.MatchString(nqn):
		return fmt.Errorf("NQN %q does not have the form nqn.YYYY-MM.reverse.domain:name", nqn)
	}
	return nil
}

// cstring reads a NUL-terminated (or full-length) field.
func cstring(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

// PadString copies s into b, space padded as the identify structures want, cut when too long.
func PadString(b []byte, s string) {
	for i := copy(b, s); i < len(b); i++ {
		b[i] = ' '
	}
}
