//! From SVG to PNG.

use std::sync::Arc;

use anyhow::Context;
use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::{Options, Tree, fontdb};

/// Pixels of the PNG for each of the SVG's: readable on screens of any density.
const SCALE: f32 = 2.0;

/// Draws pictures with the system's fonts.
pub(in crate::bench) struct Painter {
    fonts: Arc<fontdb::Database>,
}

impl Painter {
    /// Looks for the fonts.
    ///
    /// # Errors
    /// When there are none: pictures without text say nothing.
    pub(in crate::bench) fn new() -> anyhow::Result<Painter> {
        let mut fonts = fontdb::Database::new();
        fonts.load_system_fonts();
        anyhow::ensure!(
            !fonts.is_empty(),
            "no font is installed; install one (Debian: apt-get install fonts-dejavu-core)"
        );
        // What the generic name at the end of the list stands for.
        let family = fonts.faces().find_map(|face| Some(face.families.first()?.0.clone()));
        if let Some(family) = family {
            fonts.set_sans_serif_family(family);
        }
        Ok(Painter { fonts: Arc::new(fonts) })
    }

    /// Draws one.
    pub(in crate::bench) fn png(&self, svg: &str) -> anyhow::Result<Vec<u8>> {
        let options = Options { fontdb: Arc::clone(&self.fonts), ..Options::default() };
        let tree = Tree::from_str(svg, &options).context("a chart that is no SVG")?;
        let size = tree.size().to_int_size().scale_by(SCALE).context("a chart without a size")?;
        let mut pixels = Pixmap::new(size.width(), size.height()).context("a chart that is too large")?;
        resvg::render(&tree, Transform::from_scale(SCALE, SCALE), &mut pixels.as_mut());
        pixels.encode_png().context("can't encode a PNG")
    }
}
