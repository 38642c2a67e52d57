//! Small panels of horizontal bars, one panel a test, one bar a stack.

use super::svg::{Anchor, Svg};
use super::{GRID, INK, MUTED, figure};

/// A bar with the least and the most of its rounds.
#[derive(Debug, Clone)]
pub(in crate::bench) struct Bar {
    pub(in crate::bench) label: String,
    pub(in crate::bench) colour: &'static str,
    pub(in crate::bench) value: f64,
    pub(in crate::bench) min: f64,
    pub(in crate::bench) max: f64,
}

/// Bars in one unit.
#[derive(Debug, Clone)]
pub(in crate::bench) struct Panel {
    pub(in crate::bench) title: String,
    /// The unit, and which way is good.
    pub(in crate::bench) subtitle: String,
    pub(in crate::bench) bars: Vec<Bar>,
    /// What stands under the bars, for instance what is missing.
    pub(in crate::bench) note: String,
}

const WIDTH: f64 = 470.0;
const LABELS: f64 = 96.0;
const VALUES: f64 = 62.0;
const HEAD: f64 = 46.0;
const ROW: f64 = 24.0;
const FOOT: f64 = 28.0;
const MARGIN: f64 = 18.0;
const COLUMNS: usize = 2;

/// Draws panels in two columns under a title.
pub(in crate::bench) fn panels(title: &str, panels: &[Panel]) -> String {
    let rows = panels.iter().map(|panel| panel.bars.len()).max().unwrap_or(0);
    let height = HEAD + ROW * rows as f64 + FOOT;
    let lines = panels.len().div_ceil(COLUMNS);
    let columns = panels.len().clamp(1, COLUMNS);
    let top = 44.0;
    let mut svg =
        Svg::new(columns as f64 * WIDTH + (columns + 1) as f64 * MARGIN, top + lines as f64 * (height + MARGIN));
    svg.bold((MARGIN, 28.0), Anchor::Start, 17.0, INK, title);
    for (index, panel) in panels.iter().enumerate() {
        let x = MARGIN + (index % COLUMNS) as f64 * (WIDTH + MARGIN);
        let y = top + (index / COLUMNS) as f64 * (height + MARGIN);
        draw(&mut svg, panel, x, y);
    }
    svg.finish()
}

fn draw(svg: &mut Svg, panel: &Panel, x: f64, y: f64) {
    svg.bold((x, y + 14.0), Anchor::Start, 13.0, INK, &panel.title);
    svg.text((x, y + 31.0), Anchor::Start, 11.0, MUTED, &panel.subtitle);
    let (left, right) = (x + LABELS, x + WIDTH - VALUES);
    let most = panel.bars.iter().map(|bar| bar.max).fold(f64::MIN_POSITIVE, f64::max);
    let at = |value: f64| left + (right - left) * (value / most).clamp(0.0, 1.0);
    let top = y + HEAD;
    svg.line((left, top - 4.0), (left, top + ROW * panel.bars.len() as f64), GRID, 1.0);
    for (index, bar) in panel.bars.iter().enumerate() {
        let middle = top + ROW * index as f64 + ROW / 2.0 - 2.0;
        svg.text((left - 8.0, middle + 4.0), Anchor::End, 12.0, INK, &bar.label);
        svg.rect(left, middle - 7.0, (at(bar.value) - left).max(1.0), 14.0, bar.colour);
        if bar.max > bar.min {
            svg.line((at(bar.min), middle), (at(bar.max), middle), INK, 1.2);
            for end in [bar.min, bar.max] {
                svg.line((at(end), middle - 3.5), (at(end), middle + 3.5), INK, 1.2);
            }
        }
        svg.text((at(bar.max) + 7.0, middle + 4.0), Anchor::Start, 12.0, INK, &figure(bar.value));
    }
    let bottom = top + ROW * panel.bars.len() as f64 + 14.0;
    svg.text((x, bottom), Anchor::Start, 10.5, MUTED, &panel.note);
}
