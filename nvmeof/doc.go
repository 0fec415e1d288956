// Package nvmeof holds the wire formats of NVMe over Fabrics that kvof speaks: commands, completions,
// identify and log structures, fabrics capsules, NVMe/TCP PDUs, the Key Value and NVM command sets, and NQNs.
//
// It encodes, decodes and validates. It does no I/O, keeps no state and starts no goroutine, so the target and the
// host share one codec, fuzzed once. All multi-byte fields are little endian unless a comment says otherwise.
// Decoders never retain their input; encoders write into memory that the caller owns.
//
// Sources: NVM Express Base Specification 2.0 ("Base"), NVM Command Set 1.0, Key Value Command Set 1.0-1.3 ("KV"),
// NVMe over TCP Transport 1.0 ("TCP"), NVMe over RDMA Transport 1.0.
package nvmeof
