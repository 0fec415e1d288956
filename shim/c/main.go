// Libkvof is the C interface to kvof's host, kvof.h, over package client. It is built with
//
//	go build -buildmode=c-shared -o libkvof.so ./shim/c
//
// docs/shim.md is for those who use it.
package main

func main() {} // a library has none, but Go wants it
