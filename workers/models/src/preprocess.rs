//! From a decoded image to the pixels that the vision transformer takes.

use std::path::Path;

use candle_core::{Device, Tensor};
use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;
use serde::{Deserialize, Serialize};

use crate::error::{ModelError, Result};

/// Mean and deviation of CLIP's training images, per channel, in units of full brightness.
const CLIP_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const CLIP_STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// `Image.Resampling.BICUBIC` of Pillow.
const BICUBIC: u32 = 3;

/// One image, ready for the model: normalised f32 of shape `(3, side, side)`.
#[derive(Debug, Clone, PartialEq)]
pub struct Pixels {
    side: usize,
    values: Vec<f32>,
}

impl Pixels {
    /// From the values of shape `(3, side, side)`.
    ///
    /// # Errors
    /// There are not `3·side²` values.
    pub fn new(side: usize, values: Vec<f32>) -> Result<Self> {
        if values.len() != 3 * side * side {
            return Err(ModelError::Input(format!("{} values are not 3 channels of {side}x{side}", values.len())));
        }
        Ok(Self { side, values })
    }

    /// Side in pixels.
    #[must_use]
    pub fn side(&self) -> usize {
        self.side
    }

    /// The values, channel by channel, row by row.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Several images as one f32 tensor `(b, 3, side, side)`.
    ///
    /// # Errors
    /// There is none, or they differ in size.
    pub fn stack(images: &[Self], device: &Device) -> Result<Tensor> {
        let side = match images.first() {
            Some(first) => first.side,
            None => return Err(ModelError::Input("no image to stack".to_owned())),
        };
        if let Some(other) = images.iter().find(|image| image.side != side) {
            return Err(ModelError::Input(format!("images of side {side} and {} do not stack", other.side)));
        }
        let mut all = Vec::with_capacity(images.len() * 3 * side * side);
        for image in images {
            all.extend_from_slice(&image.values);
        }
        Ok(Tensor::from_vec(all, (images.len(), 3, side, side), device)?)
    }
}

/// BLIP's evaluation transform: resize straight to a square (bicubic, the whole image, no crop), scale to [0, 1], normalise.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocessor {
    side: usize,
    mean: [f32; 3],
    std: [f32; 3],
}

/// `preprocessor_config.json` of Hugging Face's `BlipImageProcessor`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
struct PreprocessorFile {
    image_processor_type: String,
    do_resize: bool,
    size: Size,
    resample: u32,
    do_rescale: bool,
    rescale_factor: f64,
    do_normalize: bool,
    image_mean: [f32; 3],
    image_std: [f32; 3],
    do_convert_rgb: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Size {
    Rectangle { height: usize, width: usize },
    Square(usize),
}

impl Default for PreprocessorFile {
    fn default() -> Self {
        Self {
            image_processor_type: "BlipImageProcessor".to_owned(),
            do_resize: true,
            size: Size::Square(384),
            resample: BICUBIC,
            do_rescale: true,
            rescale_factor: 1.0 / 255.0,
            do_normalize: true,
            image_mean: CLIP_MEAN,
            image_std: CLIP_STD,
            do_convert_rgb: true,
        }
    }
}

impl Preprocessor {
    /// For a model with images of this side and CLIP's mean and deviation.
    #[must_use]
    pub fn new(side: usize) -> Self {
        Self { side, mean: CLIP_MEAN, std: CLIP_STD }
    }

    /// Reads `preprocessor_config.json` of a checkpoint directory.
    ///
    /// # Errors
    /// The file cannot be read or parsed, or asks for another transform than this one.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = file(dir);
        let text = std::fs::read_to_string(&path).map_err(|source| ModelError::Io { path: path.clone(), source })?;
        let parsed: PreprocessorFile =
            serde_json::from_str(&text).map_err(|source| ModelError::Json { path: path.clone(), source })?;
        let side = match parsed.size {
            Size::Square(side) => side,
            Size::Rectangle { height, width } if height == width => height,
            Size::Rectangle { height, width } => {
                return Err(ModelError::Config(format!(
                    "{} asks for images of {width}x{height}, only squares are implemented",
                    path.display()
                )));
            }
        };
        let usual = parsed.do_resize
            && parsed.resample == BICUBIC
            && parsed.do_rescale
            && (parsed.rescale_factor * 255.0 - 1.0).abs() < 1e-6
            && parsed.do_normalize;
        if !usual || side == 0 || parsed.image_std.contains(&0.0) {
            return Err(ModelError::Config(format!(
                "{} asks for another transform than bicubic resize, 1/255 and normalisation",
                path.display()
            )));
        }
        Ok(Self { side, mean: parsed.image_mean, std: parsed.image_std })
    }

    /// The text of a `preprocessor_config.json` that [`Self::from_dir`] and transformers read back.
    #[must_use]
    pub fn to_json(&self) -> String {
        let file = PreprocessorFile {
            size: Size::Rectangle { height: self.side, width: self.side },
            image_mean: self.mean,
            image_std: self.std,
            ..PreprocessorFile::default()
        };
        // Numbers and short strings always serialise.
        serde_json::to_string_pretty(&file).unwrap_or_default()
    }

    /// Side of the square in pixels.
    #[must_use]
    pub fn side(&self) -> usize {
        self.side
    }

    /// Resizes (as Pillow's bicubic does, to 8 bits) and normalises one image.
    ///
    /// # Errors
    /// The image has no pixels.
    pub fn prepare(&self, image: &RgbImage) -> Result<Pixels> {
        let (width, height) = image.dimensions();
        let fail = |reason: String| ModelError::Image { width, height, reason };
        if width == 0 || height == 0 {
            return Err(fail("it is empty".to_owned()));
        }
        let side = self.side;
        let square = u32::try_from(side).map_err(|e| fail(e.to_string()))?;
        let source = ImageRef::new(width, height, image.as_raw(), PixelType::U8x3).map_err(|e| fail(e.to_string()))?;
        // CatmullRom is the cubic with a = -0.5 that Pillow calls bicubic, with the same support when shrinking. Pillow goes along rows
        // first and rounds to 8 bits in between; the other order differs by up to 16 steps at sharp edges.
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom));
        let mut resizer = Resizer::new();
        let mut narrow = Image::new(square, height, PixelType::U8x3);
        let mut target = Image::new(square, square, PixelType::U8x3);
        resizer.resize(&source, &mut narrow, &options).map_err(|e| fail(e.to_string()))?;
        resizer.resize(&narrow, &mut target, &options).map_err(|e| fail(e.to_string()))?;

        let mut values = vec![0.0; 3 * side * side];
        for (channel, plane) in values.chunks_exact_mut(side * side).enumerate() {
            let scale = 1.0 / (255.0 * self.std[channel]);
            let shift = self.mean[channel] / self.std[channel];
            for (value, pixel) in plane.iter_mut().zip(target.buffer().chunks_exact(3)) {
                *value = f32::from(pixel[channel]) * scale - shift;
            }
        }
        Pixels::new(side, values)
    }
}

/// The path under which [`Preprocessor::from_dir`] looks.
pub(crate) fn file(dir: &Path) -> std::path::PathBuf {
    dir.join("preprocessor_config.json")
}
