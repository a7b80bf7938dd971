//! From a decoded image to the pixels that the vision transformer takes.

use std::path::Path;

use candle_core::{Device, Tensor};
use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{ModelError, Result};
use crate::files::{PREPROCESSOR, PROCESSOR, read_text};

/// Mean and deviation of CLIP's training images, per channel, in units of full brightness.
pub(crate) const CLIP_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
pub(crate) const CLIP_STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// `Image.Resampling` of Pillow.
const BILINEAR: u32 = 2;
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
        if !device.is_cpu() {
            // Each goes from where it lies; they are put together there.
            let there = images.iter().map(|image| Tensor::from_slice(&image.values, (3, side, side), device));
            return Ok(Tensor::stack(&there.collect::<candle_core::Result<Vec<_>>>()?, 0)?);
        }
        let mut all = Vec::with_capacity(images.len() * 3 * side * side);
        for image in images {
            all.extend_from_slice(&image.values);
        }
        Ok(Tensor::from_vec(all, (images.len(), 3, side, side), device)?)
    }
}

/// The evaluation transform of a model: resize (the whole image), perhaps crop the middle, scale to [0, 1], normalise.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocessor {
    fit: Fit,
    filter: FilterType,
    side: usize,
    mean: [f32; 3],
    std: [f32; 3],
}

/// How an image becomes a square.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fit {
    /// Its sides are stretched to the square's (BLIP, SigLIP).
    Stretch,
    /// Its shorter edge gets this length, and the middle is cut out (CLIP).
    Crop { shortest_edge: usize, middle: Middle },
}

/// Where the middle begins when an odd number of pixels is too many.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Middle {
    /// Half of them, rounded down (transformers).
    Down,
    /// Half of them, rounded to the even neighbour (torchvision, which OpenCLIP uses).
    Even,
}

impl Middle {
    fn start(self, spare: usize) -> usize {
        match self {
            Self::Down => spare / 2,
            Self::Even => spare / 2 + usize::from(spare % 4 == 3),
        }
    }
}

/// `preprocessor_config.json` of an image processor of Hugging Face.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
struct PreprocessorFile {
    /// The older `feature_extractor_type` has the same beginning: CLIP, Blip, Siglip.
    #[serde(alias = "feature_extractor_type")]
    image_processor_type: String,
    do_resize: bool,
    size: Option<Size>,
    resample: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    do_center_crop: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    crop_size: Option<Size>,
    /// `even` for OpenCLIP's middle, which transformers does not know.
    #[serde(skip_serializing_if = "Option::is_none")]
    crop_rounding: Option<Middle>,
    do_rescale: bool,
    rescale_factor: f64,
    do_normalize: bool,
    image_mean: Option<[f32; 3]>,
    image_std: Option<[f32; 3]>,
    do_convert_rgb: bool,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(untagged)]
enum Size {
    Rectangle { height: usize, width: usize },
    Shortest { shortest_edge: usize },
    Number(usize),
}

impl Default for PreprocessorFile {
    fn default() -> Self {
        Self {
            image_processor_type: String::new(),
            do_resize: true,
            size: None,
            resample: BICUBIC,
            do_center_crop: None,
            crop_size: None,
            crop_rounding: None,
            do_rescale: true,
            rescale_factor: 1.0 / 255.0,
            do_normalize: true,
            image_mean: None,
            image_std: None,
            do_convert_rgb: true,
        }
    }
}

impl PreprocessorFile {
    /// The transform, or why there is none.
    fn preprocessor(&self) -> std::result::Result<Preprocessor, String> {
        let is = |family: &str| self.image_processor_type.to_lowercase().starts_with(family);
        // What the classes of transformers 5 do where a key is missing.
        let crops = self.do_center_crop.unwrap_or(is("clip"));
        let size = self.size.unwrap_or(match () {
            () if is("siglip") => Size::Rectangle { height: 224, width: 224 },
            () if crops => Size::Shortest { shortest_edge: 224 },
            () => Size::Rectangle { height: 384, width: 384 },
        });
        let stretched = match size {
            Size::Rectangle { height, width } if height == width => Some(height),
            Size::Rectangle { height, width } => return Err(format!("asks for images of {width}x{height}, not for squares")),
            Size::Number(side) if !crops => Some(side),
            Size::Number(_) | Size::Shortest { .. } => None,
        };
        let cropped = match self.crop_size.unwrap_or(Size::Number(224)) {
            Size::Number(side) => side,
            Size::Rectangle { height, width } if height == width => height,
            other => return Err(format!("crops to {other:?}, not to a square")),
        };
        let (fit, side) = match (size, stretched) {
            (_, Some(side)) if !crops || side == cropped => (Fit::Stretch, side),
            (Size::Number(edge) | Size::Shortest { shortest_edge: edge }, None) if crops && edge >= cropped => {
                (Fit::Crop { shortest_edge: edge, middle: self.crop_rounding.unwrap_or(Middle::Down) }, cropped)
            }
            _ => return Err(format!("resizes to {size:?} and crops to {cropped}, which gives no full square")),
        };
        let filter = match self.resample {
            BILINEAR => FilterType::Bilinear,
            BICUBIC => FilterType::CatmullRom,
            other => return Err(format!("resamples with filter {other}, not with the bilinear 2 or the bicubic 3")),
        };
        let usual = self.do_resize && self.do_rescale && (self.rescale_factor * 255.0 - 1.0).abs() < 1e-6 && self.do_normalize;
        if !usual {
            return Err("asks for another transform than resize, 1/255 and normalisation".to_owned());
        }
        let (mean, std) = if is("siglip") { ([0.5; 3], [0.5; 3]) } else { (CLIP_MEAN, CLIP_STD) };
        let (mean, std) = (self.image_mean.unwrap_or(mean), self.image_std.unwrap_or(std));
        Preprocessor { fit, filter, side, mean, std }.checked()
    }
}

/// `preprocess_cfg` of OpenCLIP's `open_clip_config.json`.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct OpenClipFile {
    mean: [f32; 3],
    std: [f32; 3],
    interpolation: String,
    resize_mode: String,
}

impl Default for OpenClipFile {
    fn default() -> Self {
        Self { mean: CLIP_MEAN, std: CLIP_STD, interpolation: "bicubic".to_owned(), resize_mode: "shortest".to_owned() }
    }
}

impl OpenClipFile {
    /// The transform (`image_transform` of OpenCLIP's `transform.py`) for images of this side, or why there is none.
    fn preprocessor(&self, side: usize) -> std::result::Result<Preprocessor, String> {
        let fit = match self.resize_mode.as_str() {
            "shortest" => Fit::Crop { shortest_edge: side, middle: Middle::Even },
            "squash" => Fit::Stretch,
            other => return Err(format!("has resize_mode {other:?}, not \"shortest\" or \"squash\"")),
        };
        let filter = match self.interpolation.as_str() {
            "bilinear" => FilterType::Bilinear,
            // `random` is of training.
            "bicubic" | "random" => FilterType::CatmullRom,
            other => return Err(format!("has interpolation {other:?}, not \"bilinear\" or \"bicubic\"")),
        };
        Preprocessor { fit, filter, side, mean: self.mean, std: self.std }.checked()
    }
}

impl Preprocessor {
    /// BLIP's, for a model with images of this side: stretched, with CLIP's mean and deviation.
    #[must_use]
    pub fn new(side: usize) -> Self {
        Self { fit: Fit::Stretch, filter: FilterType::CatmullRom, side, mean: CLIP_MEAN, std: CLIP_STD }
    }

    /// Reads `preprocessor_config.json` of a checkpoint directory, or, where there is none, the `image_processor` of its
    /// `processor_config.json`.
    ///
    /// # Errors
    /// The file cannot be read or parsed, or asks for a transform that is not implemented.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Processor {
            image_processor: Value,
        }
        let path = file(dir);
        if !path.exists() {
            let what = format!("{} has no {PREPROCESSOR}; put there that of the model's repository", dir.display());
            return Err(ModelError::Config(what));
        }
        let text = read_text(&path)?;
        if !path.ends_with(PROCESSOR) {
            return Self::from_json(&text, &path);
        }
        let whole: Processor = serde_json::from_str(&text).map_err(|source| ModelError::Json { path: path.clone(), source })?;
        Self::from_json(&whole.image_processor.to_string(), &path)
    }

    /// From the text of a `preprocessor_config.json`; `path` is for messages.
    ///
    /// # Errors
    /// As [`Self::from_dir`].
    pub fn from_json(text: &str, path: &Path) -> Result<Self> {
        let parsed: PreprocessorFile =
            serde_json::from_str(text).map_err(|source| ModelError::Json { path: path.to_owned(), source })?;
        parsed.preprocessor().map_err(|what| ModelError::Config(format!("{} {what}", path.display())))
    }

    /// From the text of OpenCLIP's `open_clip_config.json` (its `preprocess_cfg`), for a model with images of this side; `path` is for
    /// messages.
    ///
    /// # Errors
    /// As [`Self::from_dir`].
    pub fn from_open_clip(text: &str, side: usize, path: &Path) -> Result<Self> {
        let json = |source| ModelError::Json { path: path.to_owned(), source };
        let mut whole: Value = serde_json::from_str(text).map_err(json)?;
        let parsed: OpenClipFile = match whole.get_mut("preprocess_cfg") {
            Some(part) => serde_json::from_value(part.take()).map_err(json)?,
            None => OpenClipFile::default(),
        };
        parsed.preprocessor(side).map_err(|what| ModelError::Config(format!("{} {what}", path.display())))
    }

    /// The text of a `preprocessor_config.json` that [`Self::from_dir`] and transformers read back; only transformers passes over it that
    /// OpenCLIP begins the middle of an image one pixel further on where the pixels cut off leave 3 modulo 4.
    #[must_use]
    pub fn to_json(&self) -> String {
        let square = Size::Rectangle { height: self.side, width: self.side };
        let (processor, size, crop, rounding) = match self.fit {
            Fit::Stretch => ("BlipImageProcessor", square, None, None),
            Fit::Crop { shortest_edge, middle } => {
                let rounding = (middle == Middle::Even).then_some(middle);
                ("CLIPImageProcessor", Size::Shortest { shortest_edge }, Some(square), rounding)
            }
        };
        let file = PreprocessorFile {
            image_processor_type: processor.to_owned(),
            size: Some(size),
            resample: if self.filter == FilterType::Bilinear { BILINEAR } else { BICUBIC },
            do_center_crop: crop.map(|_| true),
            crop_size: crop,
            crop_rounding: rounding,
            image_mean: Some(self.mean),
            image_std: Some(self.std),
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

    /// The same for a model that is trained on whole images, stretched to the square: nothing is cut off them.
    #[must_use]
    pub(crate) fn stretching(self) -> Self {
        Self { fit: Fit::Stretch, ..self }
    }

    fn checked(self) -> std::result::Result<Self, String> {
        match self.side == 0 || self.std.contains(&0.0) {
            true => Err("asks for images of side 0 or a deviation of 0".to_owned()),
            false => Ok(self),
        }
    }

    /// Resizes (as Pillow does, to 8 bits) and normalises one image.
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
        let (resized_width, resized_height) = self.resized(width as usize, height as usize);
        let (left, box_width) = self.window(width, resized_width);
        let (top, box_height) = self.window(height, resized_height);
        // CatmullRom is the cubic with a = -0.5 that Pillow calls bicubic, with the same support when shrinking. Only what ends in the
        // crop is computed: a filter at the border of the window still sees the pixels beyond.
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(self.filter));
        let mut resizer = Resizer::new();
        let mut target = Image::new(square, square, PixelType::U8x3);
        // Pillow goes along one side after the other and rounds to 8 bits in between, so the order shows, by up to 16 steps at sharp edges.
        // Along rows first, but where twice as many rows as columns go (found by trial on Pillow 13).
        let gone = |from: u32, to: usize| i64::from(from) - to as i64;
        let columns_first = gone(height, resized_height) > (2 * gone(width, resized_width)).max(0);
        let (mut half, first, second) = match columns_first {
            false => (
                Image::new(square, height, PixelType::U8x3),
                options.crop(left, 0.0, box_width, f64::from(height)),
                options.crop(0.0, top, f64::from(square), box_height),
            ),
            true => (
                Image::new(width, square, PixelType::U8x3),
                options.crop(0.0, top, f64::from(width), box_height),
                options.crop(left, 0.0, box_width, f64::from(square)),
            ),
        };
        resizer.resize(&source, &mut half, &first).map_err(|e| fail(e.to_string()))?;
        resizer.resize(&half, &mut target, &second).map_err(|e| fail(e.to_string()))?;

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

    /// Width and height of the whole image after resizing, before it is cropped.
    fn resized(&self, width: usize, height: usize) -> (usize, usize) {
        match self.fit {
            Fit::Stretch => (self.side, self.side),
            // The longer side is rounded down, as in `get_resize_output_image_size` of transformers and in torchvision.
            Fit::Crop { shortest_edge: edge, .. } if width <= height => (edge, edge * height / width),
            Fit::Crop { shortest_edge: edge, .. } => (edge * width / height, edge),
        }
    }

    /// Start and length, along a side of `length` pixels that becomes `resized`, of what ends in the square.
    fn window(&self, length: u32, resized: usize) -> (f64, f64) {
        let start = match self.fit {
            Fit::Stretch => 0,
            Fit::Crop { middle, .. } => middle.start(resized - self.side),
        };
        let scale = f64::from(length) / resized as f64;
        let start = start as f64 * scale;
        (start, (self.side as f64 * scale).min(f64::from(length) - start))
    }
}

/// The path under which [`Preprocessor::from_dir`] looks.
pub(crate) fn file(dir: &Path) -> std::path::PathBuf {
    let (whole, part) = (dir.join(PREPROCESSOR), dir.join(PROCESSOR));
    if part.exists() && !whole.exists() { part } else { whole }
}
