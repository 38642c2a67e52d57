// An echo server for datagrams, linked statically: its calls don't go through libc.
package main

import (
	"net"
	"os"
)

func main() {
	address, err := net.ResolveUDPAddr("udp", os.Args[1])
	if err != nil {
		panic(err)
	}
	connection, err := net.ListenUDP("udp", address)
	if err != nil {
		panic(err)
	}
	buffer := make([]byte, 65536)
	for {
		count, from, err := connection.ReadFromUDPAddrPort(buffer)
		if err != nil {
			panic(err)
		}
		if _, err := connection.WriteToUDPAddrPort(buffer[:count], from); err != nil {
			panic(err)
		}
	}
}
