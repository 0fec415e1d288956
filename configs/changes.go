package configs

import "slices"

// Changes compares a running configuration with a new one. It returns the keys whose new values need a
// restart, in the order of Config; everything else (subsystems and their namespaces and hosts,
// referrals, the log level) can change under connected hosts.
func Changes(old, new *Config) (restart []string) {
	for _, key := range []struct {
		name string
		same bool
	}{
		{"memory.arena", old.Memory.Arena == new.Memory.Arena},
		{"management.socket", old.Management.Socket == new.Management.Socket},
		{"management.listen", old.Management.Listen == new.Management.Listen},
		{"limits", old.Limits == new.Limits},
		{"listener", slices.Equal(old.Listeners, new.Listeners)},
		{"discovery.address", slices.Equal(old.Discovery.Addresses, new.Discovery.Addresses)},
	} {
		if !key.same {
			restart = append(restart, key.name)
		}
	}
	return restart
}
