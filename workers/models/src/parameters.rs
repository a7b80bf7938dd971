//! Which tensors a model has, and how fresh ones are drawn.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

use crate::config::MedConfig;
use crate::error::{ModelError, Result};
use crate::med::{Med, Parts};
use crate::random::Stream;

/// One tensor of a model.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// Name in the weight file.
    pub name: String,
    /// Shape in the weight file.
    pub shape: Vec<usize>,
    /// How a fresh one is drawn.
    pub init: Init,
}

/// Every tensor of a MED with these parts, in the order of names. The tied weight of the language-model head is not among them.
///
/// # Errors
/// The config is unusable.
pub fn parameters(config: &MedConfig, parts: Parts) -> Result<Vec<Parameter>> {
    Ok(asked_for(u64::MAX, |vb| Med::load(config, vb, parts))?.list)
}

/// What loading a model asks its builder for.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    /// The tensors in the order of names.
    pub(crate) list: Vec<Parameter>,
    /// The model asks for more numbers than were allowed: the list ends with the tensor that was too much.
    pub(crate) too_much: bool,
    left: u64,
}

/// The tensors that loading a model asks its builder for, with at most this many numbers in all: layers may lay out anew what they get,
/// so the memory of a model of any size would be needed otherwise.
///
/// # Errors
/// As `load`.
pub(crate) fn asked_for<M>(numbers: u64, load: impl FnOnce(VarBuilder<'static>) -> Result<M>) -> Result<Asked> {
    // The model is built once from a source that notes what is asked for: the list cannot drift from the code.
    let recorder = Recorder(Arc::new(Mutex::new(Asked { left: numbers, ..Asked::default() })));
    let asked = Arc::clone(&recorder.0);
    let loaded = load(VarBuilder::from_backend(Box::new(recorder), DType::F32, Device::Cpu));
    let mut asked = std::mem::take(&mut *asked.lock().unwrap_or_else(PoisonError::into_inner));
    if !asked.too_much {
        loaded?;
    }
    asked.list.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(asked)
}

/// Fresh weights for a MED, f32: normal with deviation 0.02, biases 0, layer norms 1 and 0.
///
/// Each tensor is drawn from its own stream keyed by `seed` and its name, so the result does not depend on order or on which
/// other parts are there.
///
/// # Errors
/// The config is unusable, or the device has no memory.
pub fn fresh_tensors(config: &MedConfig, parts: Parts, seed: u64, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    parameters(config, parts)?
        .into_iter()
        .map(|parameter| {
            let values = draw(&parameter, seed)?;
            let tensor = Tensor::from_vec(values, parameter.shape, device)?;
            Ok((parameter.name, tensor))
        })
        .collect()
}

fn draw(parameter: &Parameter, seed: u64) -> Result<Vec<f32>> {
    let count = parameter.shape.iter().product();
    match parameter.init {
        Init::Const(value) => Ok(vec![value as f32; count]),
        Init::Randn { mean, stdev } => {
            let mut stream = Stream::new("fresh weight", seed, &[parameter.name.as_bytes()]);
            Ok((0..count).map(|_| (mean + stdev * stream.normal()) as f32).collect())
        }
        Init::Uniform { .. } | Init::Kaiming { .. } => Err(ModelError::Config(format!("no way to draw {}", parameter.name))),
    }
}

/// A source of tensors that notes every request and answers with zeros that take no memory until they are laid out.
struct Recorder(Arc<Mutex<Asked>>);

impl SimpleBackend for Recorder {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let parameter = Parameter { name: name.to_owned(), shape: shape.dims().to_vec(), init };
        let numbers = shape.dims().iter().try_fold(1_u64, |all, n| all.checked_mul(*n as u64));
        let mut asked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        asked.list.push(parameter);
        match numbers.and_then(|numbers| asked.left.checked_sub(numbers)) {
            Some(left) => asked.left = left,
            None => asked.too_much = true,
        }
        if asked.too_much {
            candle_core::bail!("{name} is more than was allowed for");
        }
        drop(asked);
        // A variable, as in training: `Linear::new` does not lay it out anew.
        Var::zeros((), dtype, device)?.broadcast_as(shape)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("{name} was asked for without a shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        false
    }
}
