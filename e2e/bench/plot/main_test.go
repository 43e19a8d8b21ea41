package main

import (
	"bytes"
	"os"
	"strings"
	"testing"
)

const docs = "../../../docs/"

// The picture in docs is of the figures beside it, to the byte.
func TestPicture(t *testing.T) {
	in, err := os.ReadFile(docs + "hold.csv")
	if err != nil {
		t.Fatal(err)
	}
	d, err := read(bytes.NewReader(in))
	if err != nil {
		t.Fatal(err)
	}
	got, err := picture(d)
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(docs + "hold.svg")
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("docs/hold.svg is not what is drawn of docs/hold.csv; `go run . %shold.csv %[1]shold.svg` draws it; %v", docs, err)
	}
	for _, lock := range d.locks {
		if !bytes.Contains(got, []byte(">"+lock+"<")) {
			t.Errorf("the legend lacks %s", lock)
		}
	}
}

func TestRead(t *testing.T) {
	const header = "measure,lock,window_ms,felt_ms\n"
	good := header + "open,drop,20,208.1\nconnect,drop,20,1028.0\n"
	if d, err := read(strings.NewReader(good)); err != nil || d.felt[[3]string{"open", "drop", "20"}] != 208.1 {
		t.Errorf("%+v, %v", d, err)
	}
	for name, text := range map[string]string{
		"nothing":         "",
		"no rows":         header,
		"another header":  strings.Replace(good, "lock", "look", 1),
		"a measure less":  header + "open,drop,20,208.1\n",
		"a window less":   good + "open,drop,100,208.1\n",
		"no number":       strings.Replace(good, "208.1", "long", 1),
		"too many locks":  good + "open,b,20,1\nopen,c,20,1\nopen,d,20,1\nopen,e,20,1\nconnect,b,20,1\nconnect,c,20,1\nconnect,d,20,1\nconnect,e,20,1\n",
		"a column at all": "x\n",
	} {
		if d, err := read(strings.NewReader(text)); err == nil {
			t.Errorf("%s: %+v", name, d)
		}
	}
}
