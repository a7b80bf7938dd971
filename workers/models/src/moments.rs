//! How the image features of a filter are spread, and cosines in units of that.
//!
//! A cosine alone says little of a text: `image` lies as near to every picture as `a red bus` to one. Held against what the text has with other
//! pictures, the first is nothing and the second is far out. With features of mean μ and covariance Σ, the cosines of a text feature t with them have the
//! mean t·μ and the variance tᵀΣt, so no other picture has to be at hand.

use std::path::Path;

use candle_core::{D, DType, Device, Tensor};

use crate::error::{ModelError, Result};
use crate::layers::Linear;
use crate::med::Med;
use crate::preprocess::Pixels;
use crate::weights::write_file;

const MEAN: &str = "mean";
const COVARIANCE: &str = "covariance";
/// No spread of cosines is taken for smaller.
const LEAST_VARIANCE: f64 = 1e-10;

/// Mean and covariance of ITC image features.
#[derive(Debug, Clone)]
pub struct ImageMoments {
    /// `(p)`
    mean: Tensor,
    /// `(p, p)`, symmetric; a layer, so that no text depends on those beside it.
    covariance: Linear,
}

impl ImageMoments {
    /// Those of images, as a filter sees them, which come in batches: no more than one is in memory.
    ///
    /// # Errors
    /// A batch could not be had, there are fewer than 2 images, the model has no encoder, or an image has another size than it takes.
    pub fn of<E: From<ModelError>>(
        med: &Med,
        batches: impl IntoIterator<Item = std::result::Result<Vec<Pixels>, E>>,
    ) -> std::result::Result<Self, E> {
        let mut features = Vec::new();
        for batch in batches {
            features.extend(features_of(med, &batch?)?);
        }
        Ok(Self::of_features(&features, med.device())?)
    }

    fn of_features(features: &[Vec<f32>], device: &Device) -> Result<Self> {
        if features.len() < 2 {
            return Err(ModelError::Input(format!("the spread of the features of {} images", features.len())));
        }
        let width = features[0].len();
        // Sums in the order of the images, whatever the number of threads.
        let mut mean = vec![0.0_f64; width];
        for feature in features {
            mean.iter_mut().zip(feature).for_each(|(sum, x)| *sum += f64::from(*x));
        }
        mean.iter_mut().for_each(|sum| *sum /= features.len() as f64);
        let mut covariance = vec![0.0_f64; width * width];
        for feature in features {
            let centred: Vec<f64> = feature.iter().zip(&mean).map(|(x, mean)| f64::from(*x) - mean).collect();
            for (row, a) in covariance.chunks_exact_mut(width).zip(&centred) {
                row.iter_mut().zip(&centred).for_each(|(sum, b)| *sum += a * b);
            }
        }
        let single = |values: Vec<f64>, by: f64| values.into_iter().map(|value| (value / by) as f32).collect::<Vec<f32>>();
        let mean = Tensor::from_vec(single(mean, 1.0), width, &Device::Cpu)?;
        let covariance = Tensor::from_vec(single(covariance, features.len() as f64), (width, width), &Device::Cpu)?;
        Self::new(&mean, &covariance, device)
    }

    fn new(mean: &Tensor, covariance: &Tensor, device: &Device) -> Result<Self> {
        let none = mean.zeros_like()?.to_device(device)?;
        Ok(Self { mean: mean.to_device(device)?, covariance: Linear::new(covariance.to_device(device)?, none)? })
    }

    /// Writes them, in f32.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let on_cpu = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.contiguous();
        let (covariance, _) = self.covariance.tensors().ok_or_else(|| ModelError::Input("packed moments".to_owned()))?;
        write_file(path, [(MEAN, on_cpu(&self.mean)?), (COVARIANCE, on_cpu(covariance)?)])
    }

    /// Reads what [`Self::write`] wrote, for features of width `width`.
    ///
    /// # Errors
    /// The file is unreadable, or not of such features.
    pub fn read(path: &Path, width: usize, device: &Device) -> Result<Self> {
        let damaged = || ModelError::Config(format!("{} does not hold the moments of features {width} wide", path.display()));
        if !path.is_file() {
            return Err(ModelError::Config(format!(
                "there is no {}: only filters that were trained here know how their image features are spread",
                path.display()
            )));
        }
        let mut tensors = candle_core::safetensors::load(path, &Device::Cpu).map_err(|_| damaged())?;
        let mut take = |name: &str, shape: &[usize]| {
            let found = tensors.remove(name).filter(|tensor| tensor.dims() == shape && tensor.dtype() == DType::F32);
            found.ok_or_else(damaged)
        };
        Self::new(&take(MEAN, &[width])?, &take(COVARIANCE, &[width, width])?, device)
    }

    /// By how many standard deviations the cosines `(rows)` lie above those that the text features `(rows, p)` have with other images.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn standardized(&self, texts: &Tensor, cosines: &Tensor) -> Result<Tensor> {
        let (texts, cosines) = (texts.to_dtype(DType::F32)?, cosines.to_dtype(DType::F32)?);
        let mean = texts.broadcast_mul(&self.mean)?.sum(D::Minus1)?;
        let variance = (self.covariance.forward(&texts)? * &texts)?.sum(D::Minus1)?;
        Ok(((cosines - mean)? / variance.maximum(LEAST_VARIANCE)?.sqrt()?)?)
    }
}

fn features_of(med: &Med, images: &[Pixels]) -> Result<Vec<Vec<f32>>> {
    let features = med.image_features(&med.encode_images(images)?)?;
    Ok(features.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.to_vec2()?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Moments of the corners of a box that is 2 wide and 4 high about (1, 0).
    fn moments() -> ImageMoments {
        let device = &Device::Cpu;
        let covariance = Tensor::new(&[[1.0_f32, 0.0], [0.0, 4.0]], device).unwrap();
        ImageMoments::new(&Tensor::new(&[1.0_f32, 0.0], device).unwrap(), &covariance, device).unwrap()
    }

    #[test]
    fn features_have_the_moments_that_they_were_made_with() {
        let features: Vec<Vec<f32>> = [[2.0, 2.0], [2.0, -2.0], [0.0, 2.0], [0.0, -2.0]].map(Vec::from).to_vec();
        let made = ImageMoments::of_features(&features, &Device::Cpu).unwrap();
        assert_eq!(made.mean.to_vec1::<f32>().unwrap(), [1.0, 0.0]);
        assert_eq!(made.covariance.tensors().unwrap().0.to_vec2::<f32>().unwrap(), [[1.0, 0.0], [0.0, 4.0]]);
        assert!(ImageMoments::of_features(&features[..1], &Device::Cpu).is_err());
    }

    #[test]
    fn cosines_are_told_in_units_of_a_texts_own_spread() {
        let device = &Device::Cpu;
        let texts = Tensor::new(&[[1.0_f32, 0.0], [0.0, 1.0], [0.6, 0.8]], device).unwrap();
        let cosines = Tensor::new(&[3.0_f32, 3.0, 0.6], device).unwrap();
        let told = moments().standardized(&texts, &cosines).unwrap().to_vec1::<f32>().unwrap();
        for (told, expected) in told.iter().zip([2.0, 1.5, 0.0]) {
            assert!((told - expected).abs() < 1e-6, "{told} {expected}");
        }
        let alone = moments().standardized(&texts.narrow(0, 1, 1).unwrap(), &cosines.narrow(0, 1, 1).unwrap()).unwrap();
        assert_eq!(alone.to_vec1::<f32>().unwrap(), [told[1]]);
    }

    #[test]
    fn a_file_brings_them_back_and_another_width_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(crate::files::IMAGE_MOMENTS);
        assert!(ImageMoments::read(&path, 2, &Device::Cpu).unwrap_err().to_string().contains("trained here"));
        moments().write(&path).unwrap();
        let back = ImageMoments::read(&path, 2, &Device::Cpu).unwrap();
        let (there, _) = back.covariance.tensors().unwrap();
        assert_eq!(there.to_vec2::<f32>().unwrap(), [[1.0, 0.0], [0.0, 4.0]]);
        for (bytes, width) in [(std::fs::read(&path).unwrap(), 3), (b"rubbish".to_vec(), 2)] {
            std::fs::write(&path, bytes).unwrap();
            assert!(ImageMoments::read(&path, width, &Device::Cpu).unwrap_err().to_string().contains("does not hold"));
        }
    }
}
