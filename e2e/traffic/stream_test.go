package traffic

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// relay passes n bytes through unchanged and then hands over to after.
func pair(t *testing.T, meddle func(dst io.Writer, src io.Reader)) net.Conn {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	if meddle == nil {
		go Serve(server)
		return client
	}
	inner := pair(t, nil)
	go func() { io.Copy(inner, server); inner.(*net.TCPConn).CloseWrite() }()
	go func() { meddle(server, inner); server.(*net.TCPConn).CloseWrite() }()
	return client
}

func TestStreamWhole(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	s := Start(pair(t, func(dst io.Writer, src io.Reader) { io.Copy(dst, src) }))
	if err := s.Advance(ctx, 50); err != nil {
		t.Fatal(err)
	}
	st, err := s.Finish(ctx)
	if err != nil || st.Sent < 50 || st.Received < 50 {
		t.Errorf("%+v, %v", st, err)
	}
}

// A test that counts on a stream must be told of every byte that is not right.
func TestStreamBroken(t *testing.T) {
	for name, meddle := range map[string]func(dst io.Writer, src io.Reader){
		"message lost": func(dst io.Writer, src io.Reader) {
			io.CopyN(dst, src, 5*msgLen)
			io.CopyN(io.Discard, src, msgLen)
			io.Copy(dst, src)
		},
		"message repeated": func(dst io.Writer, src io.Reader) {
			var b [msgLen]byte
			io.CopyN(dst, src, 5*msgLen)
			io.ReadFull(src, b[:])
			dst.Write(b[:])
			dst.Write(b[:])
			io.Copy(dst, src)
		},
		"byte lost": func(dst io.Writer, src io.Reader) {
			io.CopyN(dst, src, 5*msgLen+30)
			io.CopyN(io.Discard, src, 1)
			io.Copy(dst, src)
		},
		"cut in a message": func(dst io.Writer, src io.Reader) {
			io.CopyN(dst, src, 5*msgLen+30)
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			s := Start(pair(t, meddle))
			if err := s.Advance(ctx, 50); err == nil || errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Advance: %v", err)
			}
			if _, err := s.Finish(ctx); err == nil {
				t.Error("Finish found nothing wrong")
			}
		})
	}
}
