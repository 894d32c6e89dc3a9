// The server of Go: main MODE; a goroutine for each connection. MODE is echo, lines, oneshot or udp.
// The first line printed is the port on 127.0.0.1. The package net sets TCP_NODELAY itself.
package main

import (
	"bufio"
	"fmt"
	"net"
	"os"
)

const atOnce = 65536 // bytes received at a time

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func echo(client net.Conn) {
	defer client.Close()
	room := make([]byte, atOnce)
	for {
		size, err := client.Read(room)
		if err != nil {
			return
		}
		if _, err = client.Write(room[:size]); err != nil {
			return
		}
	}
}

func lines(client net.Conn) {
	defer client.Close()
	reader := bufio.NewReader(client)
	for {
		line, err := reader.ReadSlice('\n')
		if err != nil {
			return
		}
		if _, err = client.Write(line); err != nil {
			return
		}
	}
}

func oneshot(client net.Conn) {
	defer client.Close()
	room := make([]byte, 4096)
	if size, err := client.Read(room); err == nil {
		client.Write(room[:size])
	}
}

func serveDatagrams() {
	socket, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	check(err)
	fmt.Println(socket.LocalAddr().(*net.UDPAddr).Port)
	room := make([]byte, 8192)
	for {
		size, address, err := socket.ReadFromUDPAddrPort(room)
		check(err)
		socket.WriteToUDPAddrPort(room[:size], address)
	}
}

func main() {
	mode := ""
	if len(os.Args) == 2 {
		mode = os.Args[1]
	}
	handlers := map[string]func(net.Conn){"echo": echo, "lines": lines, "oneshot": oneshot}
	if mode == "udp" {
		serveDatagrams()
	}
	handle, known := handlers[mode]
	if !known {
		fmt.Fprintln(os.Stderr, "usage: main echo | lines | oneshot | udp")
		os.Exit(2)
	}
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	check(err)
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	for {
		client, err := listener.Accept()
		check(err)
		go handle(client)
	}
}
