//! Charts as SVG, and as PNG drawn from that.

mod bars;
mod lines;
mod png;
mod svg;

pub(super) use bars::{Bar, Panel, panels};
pub(super) use lines::{Axis, Lines, Point, Series, Style};
pub(super) use png::Painter;
pub(super) use svg::escape;

use super::stack::Stack;

const INK: &str = "#1f2933";
const MUTED: &str = "#66727f";
const GRID: &str = "#e3e7eb";

/// A chart by its name, which becomes that of its files.
#[derive(Debug, Clone)]
pub(super) struct Chart {
    pub(super) name: &'static str,
    /// What is to be seen, in a sentence.
    pub(super) caption: String,
    pub(super) svg: String,
}

/// A stack's colour, the same in all charts; told apart by the colour-blind too (Okabe and Ito).
pub(super) fn colour(stack: Stack) -> &'static str {
    match stack {
        Stack::Kernel => "#7a8490",
        Stack::Migd => "#0072b2",
        Stack::MigdMoved => "#56b4e9",
        Stack::HomeRouted => "#e69f00",
        Stack::Smoltcp => "#009e73",
        Stack::Criu => "#d55e00",
    }
}

/// A figure with as many digits as mean something.
pub(super) fn figure(value: f64) -> String {
    match value.abs() {
        magnitude if magnitude >= 10_000.0 => {
            let text = format!("{value:.0}");
            let (head, tail) = text.split_at(text.len() - 3);
            format!("{head},{tail}")
        }
        magnitude if magnitude >= 100.0 || magnitude == magnitude.trunc() => format!("{value:.0}"),
        magnitude if magnitude >= 10.0 => format!("{value:.1}"),
        magnitude if magnitude >= 0.1 => format!("{value:.2}").trim_end_matches('0').trim_end_matches('.').to_owned(),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_the_digits_that_matter() {
        let figures = [0.0, 0.0123, 0.5, 1.234, 12.34, 123.4, 1234.0, 12_345.6, 100.0, 10.0];
        let expected = ["0", "0.012", "0.5", "1.23", "12.3", "123", "1234", "12,346", "100", "10"];
        assert_eq!(figures.map(figure), expected);
    }
}
