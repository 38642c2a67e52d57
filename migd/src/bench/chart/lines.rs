//! Lines over an axis, linear or logarithmic, with the least and the most of the rounds at each point.

use super::svg::{Anchor, Svg};
use super::{GRID, INK, MUTED, figure};

/// A point, with the least and the most of its rounds.
#[derive(Debug, Clone, Copy)]
pub(in crate::bench) struct Point {
    pub(in crate::bench) x: f64,
    pub(in crate::bench) y: f64,
    pub(in crate::bench) min: f64,
    pub(in crate::bench) max: f64,
}

impl Point {
    /// One of which there is only one.
    pub(in crate::bench) fn single(x: f64, y: f64) -> Point {
        Point { x, y, min: y, max: y }
    }
}

/// How the points of a series are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::bench) enum Style {
    /// Joined points with their values beside them.
    Marked,
    /// Only the line.
    Line,
    /// Only dots.
    Dots,
}

/// Points that belong together.
#[derive(Debug, Clone)]
pub(in crate::bench) struct Series {
    pub(in crate::bench) name: String,
    pub(in crate::bench) colour: &'static str,
    pub(in crate::bench) style: Style,
    pub(in crate::bench) points: Vec<Point>,
}

/// An axis.
#[derive(Debug, Clone)]
pub(in crate::bench) struct Axis {
    pub(in crate::bench) name: String,
    pub(in crate::bench) logarithmic: bool,
    /// Where the ticks stand; powers of ten or round steps when none are given.
    pub(in crate::bench) ticks: Vec<f64>,
}

/// A chart.
#[derive(Debug, Clone)]
pub(in crate::bench) struct Lines {
    pub(in crate::bench) title: String,
    pub(in crate::bench) x: Axis,
    pub(in crate::bench) y: Axis,
    pub(in crate::bench) series: Vec<Series>,
    /// A span that is shaded, and what it is called.
    pub(in crate::bench) shade: Option<(f64, f64, String)>,
}

pub(in crate::bench) const WIDTH: f64 = 960.0;
pub(in crate::bench) const HEIGHT: f64 = 360.0;
const LEFT: f64 = 76.0;
const RIGHT: f64 = 40.0;
const TOP: f64 = 64.0;
const BOTTOM: f64 = 54.0;

/// From values to pixels.
struct Scale {
    logarithmic: bool,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Scale {
    fn at(&self, value: f64) -> f64 {
        let place = |value: f64| if self.logarithmic { value.max(1e-9).log10() } else { value };
        let (low, high) = (place(self.low), place(self.high));
        self.from + (self.to - self.from) * ((place(value) - low) / (high - low)).clamp(0.0, 1.0)
    }

    fn ticks(&self) -> Vec<f64> {
        let mut ticks = Vec::new();
        if self.logarithmic {
            let mut tick = 10_f64.powf(self.low.log10().ceil());
            while tick <= self.high * 1.0001 {
                ticks.push(tick);
                tick *= 10.0;
            }
        } else {
            let raw = (self.high - self.low) / 6.0;
            let power = 10_f64.powf(raw.log10().floor());
            let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= raw);
            let step = step.unwrap_or(raw);
            let mut tick = (self.low / step).ceil() * step;
            while tick <= self.high + step * 1e-6 {
                ticks.push(tick);
                tick += step;
            }
        }
        ticks
    }
}

impl Lines {
    /// Draws it.
    pub(in crate::bench) fn draw(&self) -> String {
        let mut svg = Svg::new(WIDTH, HEIGHT);
        svg.bold((LEFT - 58.0, 26.0), Anchor::Start, 15.0, INK, &self.title);
        let x = scale(&self.x, self.all(|point| [point.x, point.x]), LEFT, WIDTH - RIGHT);
        let y = scale(&self.y, self.all(|point| [point.min, point.max]), HEIGHT - BOTTOM, TOP);
        if let Some((from, to, name)) = &self.shade {
            svg.rect(x.at(*from), TOP, (x.at(*to) - x.at(*from)).max(1.5), HEIGHT - BOTTOM - TOP, "#f3e9d2");
            svg.text((x.at(*from), TOP - 5.0), Anchor::Start, 11.0, MUTED, name);
        }
        self.axes(&mut svg, &x, &y);
        let mut legend = LEFT;
        for (index, series) in self.series.iter().enumerate() {
            draw(&mut svg, series, &x, &y, index);
            svg.rect(legend, 38.0, 14.0, 10.0, series.colour);
            svg.text((legend + 20.0, 47.0), Anchor::Start, 12.0, INK, &series.name);
            legend += 44.0 + 7.2 * series.name.chars().count() as f64;
        }
        svg.finish()
    }

    fn axes(&self, svg: &mut Svg, x: &Scale, y: &Scale) {
        let bottom = HEIGHT - BOTTOM;
        for tick in ticks(&self.y, y) {
            svg.line((LEFT, y.at(tick)), (WIDTH - RIGHT, y.at(tick)), GRID, 1.0);
            svg.text((LEFT - 8.0, y.at(tick) + 4.0), Anchor::End, 11.0, MUTED, &figure(tick));
        }
        for tick in ticks(&self.x, x) {
            svg.line((x.at(tick), bottom), (x.at(tick), bottom + 4.0), MUTED, 1.0);
            svg.text((x.at(tick), bottom + 18.0), Anchor::Middle, 11.0, MUTED, &figure(tick));
        }
        svg.line((LEFT, bottom), (WIDTH - RIGHT, bottom), MUTED, 1.0);
        svg.text(((LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 14.0), Anchor::Middle, 12.0, INK, &self.x.name);
        svg.upright((20.0, (TOP + bottom) / 2.0), 12.0, INK, &self.y.name);
    }

    fn all(&self, of: impl Fn(&Point) -> [f64; 2]) -> Vec<f64> {
        self.series.iter().flat_map(|series| &series.points).flat_map(of).collect()
    }
}

fn ticks(axis: &Axis, scale: &Scale) -> Vec<f64> {
    if axis.ticks.is_empty() { scale.ticks() } else { axis.ticks.clone() }
}

fn scale(axis: &Axis, values: Vec<f64>, from: f64, to: f64) -> Scale {
    let values: Vec<f64> = values.into_iter().chain(axis.ticks.iter().copied()).collect();
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let (low, high) = if values.is_empty() { (0.0, 1.0) } else { (low, high) };
    if axis.logarithmic {
        let low = low.max(1e-3);
        Scale { logarithmic: true, low: low / 1.9, high: high.max(low * 10.0) * 1.9, from, to }
    } else {
        let low = low.min(0.0);
        Scale { logarithmic: false, low, high: if high > low { high * 1.06 } else { low + 1.0 }, from, to }
    }
}

fn draw(svg: &mut Svg, series: &Series, x: &Scale, y: &Scale, index: usize) {
    let at = |point: &Point| (x.at(point.x), y.at(point.y));
    if series.style != Style::Dots {
        let points: Vec<_> = series.points.iter().map(at).collect();
        svg.polyline(&points, series.colour, if series.style == Style::Line { 1.4 } else { 2.0 });
    }
    match series.style {
        Style::Line => {}
        Style::Dots => series.points.iter().for_each(|point| svg.circle(at(point), 1.3, series.colour)),
        Style::Marked => {
            for point in &series.points {
                let (px, py) = at(point);
                svg.line((px, y.at(point.min)), (px, y.at(point.max)), series.colour, 1.6);
                svg.circle((px, py), 4.0, series.colour);
                // The first series' figures below, the others' above, so that they stay apart.
                let label = if index == 0 { y.at(point.min) + 17.0 } else { y.at(point.max) - 9.0 };
                svg.text((px, label), Anchor::Middle, 11.0, series.colour, &figure(point.y));
            }
        }
    }
}
