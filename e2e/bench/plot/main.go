// Plot draws what a client feels of a network lock, as e2e/bench has measured it:
//
//	plot DATA.csv PICTURE.svg
//
// It is a module of its own, so that who uses the lock as a library has neither the
// plotting library nor its fonts among the requirements.
package main

import (
	"bytes"
	"encoding/csv"
	"fmt"
	"image/color"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "plot:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("want DATA.csv PICTURE.svg, not %q", args)
	}
	in, err := os.Open(args[0])
	if err != nil {
		return err
	}
	defer in.Close()
	d, err := read(in)
	if err != nil {
		return fmt.Errorf("%s: %w", args[0], err)
	}
	svg, err := picture(d)
	if err != nil {
		return err
	}
	return os.WriteFile(args[1], svg, 0o644)
}

// data is what was felt in milliseconds, by measure, lock and window; locks and windows
// are in the file's order.
type data struct {
	locks, windows []string
	felt           map[[3]string]float64
}

func read(r io.Reader) (data, error) {
	d := data{felt: map[[3]string]float64{}}
	rows, err := csv.NewReader(r).ReadAll()
	if err != nil {
		return d, err
	}
	for i, row := range rows {
		if i == 0 {
			if want := []string{"measure", "lock", "window_ms", "felt_ms"}; !slices.Equal(row, want) {
				return d, fmt.Errorf("the columns are %q, want %q", row, want)
			}
			continue
		}
		ms, err := strconv.ParseFloat(row[3], 64)
		if err != nil {
			return d, fmt.Errorf("line %d: %w", i+1, err)
		}
		if !slices.Contains(d.locks, row[1]) {
			d.locks = append(d.locks, row[1])
		}
		if !slices.Contains(d.windows, row[2]) {
			d.windows = append(d.windows, row[2])
		}
		d.felt[[3]string(row)] = ms
	}
	for _, p := range panels {
		for _, l := range d.locks {
			for _, w := range d.windows {
				if _, ok := d.felt[[3]string{p.measure, l, w}]; !ok {
					return d, fmt.Errorf("lacks %s, %s, %s ms", p.measure, l, w)
				}
			}
		}
	}
	if len(d.locks) == 0 || len(d.locks) > len(colours) {
		return d, fmt.Errorf("%d locks; 1 to %d can be drawn", len(d.locks), len(colours))
	}
	return d, nil
}

// panels are drawn one below the other.
var panels = []struct{ measure, title string }{
	{"open", "An open connection: how long it stands still"},
	{"connect", "A new connection: how long connect() takes"},
}

// colours that the colour-blind can tell apart, in the order of the locks.
var colours = []color.Color{
	color.RGBA{0x55, 0x55, 0x55, 0xff},
	color.RGBA{0xaa, 0xaa, 0xaa, 0xff},
	color.RGBA{0xe6, 0x9f, 0x00, 0xff},
	color.RGBA{0x00, 0x72, 0xb2, 0xff},
}

// The picture's measures.
const (
	width, height = 8.5 * vg.Inch, 6 * vg.Inch
	barWidth      = 24 * vg.Length(1)
	margin        = 8 * vg.Length(1)
)

// families are fonts as wide as the one that the layout is made with; a browser takes
// the first that it has.
const family, families = "Liberation Sans", "'Liberation Sans', Arial, Helvetica, sans-serif"

func picture(d data) ([]byte, error) {
	top := 0.0
	for _, ms := range d.felt {
		top = max(top, ms)
	}
	canvas := vgsvg.New(width, height)
	all := draw.New(canvas)
	all.FillPolygon(color.White, []vg.Point{all.Min, {X: all.Max.X, Y: all.Min.Y}, all.Max, {X: all.Min.X, Y: all.Max.Y}})
	tiles := draw.Tiles{Rows: len(panels), Cols: 1, PadTop: margin, PadBottom: margin, PadLeft: margin, PadRight: margin, PadY: 2 * margin}
	for row, panel := range panels {
		p, err := chart(d, panel.measure, row == 0)
		if err != nil {
			return nil, err
		}
		p.Title.Text = panel.title
		p.Y.Min, p.Y.Max = 0, top*1.12 // the same scale in all, and room for the numbers
		p.Draw(tiles.At(all, 0, row))
	}
	var svg bytes.Buffer
	if _, err := canvas.WriteTo(&svg); err != nil {
		return nil, err
	}
	out := strings.ReplaceAll(svg.String(), "font-family:"+family, "font-family:"+families)
	return []byte(out), nil
}

// chart is one panel: for each window a bar for each lock.
func chart(d data, measure string, legend bool) (*plot.Plot, error) {
	p := plot.New()
	p.Title.Padding = 6
	p.X.Label.Text = "how long the lock is in force (ms)"
	p.Y.Label.Text = "as the client sees it (ms)"
	p.X.Padding, p.Y.Padding = 0, 0
	p.Y.Tick.Marker = ticks
	p.Legend.Top, p.Legend.Left = true, true
	p.Legend.Padding, p.Legend.XOffs = 3, 6
	grid := plotter.NewGrid()
	grid.Vertical.Color = nil
	grid.Horizontal.Color = color.Gray{0xdd}
	p.Add(grid)
	for i, lock := range d.locks {
		values := make(plotter.Values, len(d.windows))
		numbers := plotter.XYLabels{XYs: make(plotter.XYs, len(d.windows)), Labels: make([]string, len(d.windows))}
		for k, w := range d.windows {
			values[k] = d.felt[[3]string{measure, lock, w}]
			numbers.XYs[k] = plotter.XY{X: float64(k), Y: values[k]}
			numbers.Labels[k] = strconv.FormatFloat(values[k], 'f', 0, 64)
		}
		bars, err := plotter.NewBarChart(values, barWidth)
		if err != nil {
			return nil, err
		}
		bars.Color, bars.LineStyle.Width = colours[i], 0
		bars.Offset = (vg.Length(i) - vg.Length(len(d.locks)-1)/2) * (barWidth + 2)
		labels, err := plotter.NewLabels(numbers)
		if err != nil {
			return nil, err
		}
		labels.Offset = vg.Point{X: bars.Offset, Y: 2}
		for k := range labels.TextStyle {
			labels.TextStyle[k].XAlign = draw.XCenter
			labels.TextStyle[k].Font = sans(8)
		}
		p.Add(bars, labels)
		if legend {
			p.Legend.Add(lock, bars)
		}
	}
	for k, w := range d.windows {
		ms, err := strconv.ParseFloat(w, 64)
		if err != nil {
			return nil, fmt.Errorf("window %q: %w", w, err)
		}
		line, err := plotter.NewLine(plotter.XYs{{X: float64(k) - 0.45, Y: ms}, {X: float64(k) + 0.45, Y: ms}})
		if err != nil {
			return nil, err
		}
		line.Dashes = []vg.Length{3, 2}
		p.Add(line)
		if legend && k == 0 {
			p.Legend.Add("the lock's own time", line)
		}
	}
	p.NominalX(d.windows...)
	p.X.Min, p.X.Max = -0.5, float64(len(d.windows))-0.5
	for _, s := range []*text.Style{&p.Title.TextStyle, &p.X.Label.TextStyle, &p.Y.Label.TextStyle, &p.X.Tick.Label, &p.Y.Tick.Label, &p.Legend.TextStyle} {
		s.Font = sans(10)
	}
	p.Title.TextStyle.Font = sans(12)
	return p, nil
}

func sans(size font.Length) font.Font {
	return font.Font{Typeface: "Liberation", Variant: "Sans", Size: size}
}

// ticks are at every 500 ms.
var ticks = plot.TickerFunc(func(from, to float64) (out []plot.Tick) {
	for ms := 0.0; ms <= to; ms += 500 {
		out = append(out, plot.Tick{Value: ms, Label: strconv.FormatFloat(ms, 'f', 0, 64)})
	}
	return out
})
