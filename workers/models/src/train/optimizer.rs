//! `AdamW` (Loshchilov and Hutter 2019, arXiv 1711.05101) with public moments, parameter groups and gradient clipping.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, InplaceOp2, InplaceOp3, Layout, Tensor, Var};
use rayon::prelude::*;

use crate::error::{ModelError, Result};

/// Settings of the optimiser.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first and of the second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of matrices and embeddings. Vectors (biases, layer norms) and scalars have none.
    pub weight_decay: f64,
    /// Largest Euclidean norm of all gradients together; larger ones are scaled down to it.
    pub max_grad_norm: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.05, max_grad_norm: 1.0 }
    }
}

/// Numbers that a thread updates at a time.
const CHUNK: usize = 1 << 14;

/// A variable with its moments.
#[derive(Debug, Clone)]
pub struct Slot {
    /// The weights.
    pub variable: Var,
    /// Running mean of the gradient.
    pub first: Tensor,
    /// Running mean of the squared gradient.
    pub second: Tensor,
}

/// The optimiser and all that it trains, by name.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    slots: BTreeMap<String, Slot>,
    steps: u64,
}

impl AdamW {
    /// An optimiser with zero moments.
    ///
    /// # Errors
    ///
    /// The device has no memory for the moments.
    pub fn new(variables: BTreeMap<String, Var>, config: AdamWConfig) -> Result<Self> {
        let slots = variables
            .into_iter()
            .map(|(name, variable)| {
                let (first, second) = (variable.as_tensor().zeros_like()?, variable.as_tensor().zeros_like()?);
                Ok((name, Slot { variable, first, second }))
            })
            .collect::<Result<_>>()?;
        Ok(Self { config, slots, steps: 0 })
    }

    /// The variables and their moments, by name.
    #[must_use]
    pub fn slots(&self) -> &BTreeMap<String, Slot> {
        &self.slots
    }

    /// Updates made so far.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Continues from saved moments: for each name, the weights, the first and the second moment.
    ///
    /// # Errors
    ///
    /// A name is missing or unknown, or a shape differs.
    pub fn restore(&mut self, steps: u64, saved: &BTreeMap<String, [Tensor; 3]>) -> Result<()> {
        if let Some(unknown) = saved.keys().find(|name| !self.slots.contains_key(*name)) {
            return Err(ModelError::Input(format!("training state has {unknown}, which this model does not train")));
        }
        for (name, slot) in &mut self.slots {
            let Some([weights, first, second]) = saved.get(name) else {
                return Err(ModelError::Input(format!("training state lacks {name}")));
            };
            let shape = slot.variable.dims();
            if [weights, first, second].iter().any(|tensor| tensor.dims() != shape) {
                return Err(ModelError::Input(format!(
                    "training state has {name} of shape {:?}, the model {shape:?}",
                    weights.dims()
                )));
            }
            slot.variable.set(weights)?;
            // Moments are updated in place, so they must not share memory with the caller's tensors.
            (slot.first, slot.second) = (first.copy()?, second.copy()?);
        }
        self.steps = steps;
        Ok(())
    }

    /// The gradients of all variables, in the order of their names.
    ///
    /// # Errors
    ///
    /// [`ModelError::Training`] when a variable has no gradient.
    pub fn gradients(&self, found: &GradStore) -> Result<Vec<Tensor>> {
        let of_slot = |(name, slot): (&String, &Slot)| match found.get(slot.variable.as_tensor()) {
            Some(gradient) => Ok(gradient.contiguous()?),
            None => Err(ModelError::Training { step: self.steps, reason: format!("{name} has no gradient") }),
        };
        self.slots.iter().map(of_slot).collect()
    }

    /// One update by [`Self::gradients`] at learning rate `rate`; returns the norm of the gradients before clipping.
    ///
    /// # Errors
    ///
    /// [`ModelError::Training`] when the norm is not finite: nothing is changed then.
    pub fn step(&mut self, gradients: &[Tensor], rate: f64) -> Result<f64> {
        let mut squares = 0.0;
        for gradient in gradients {
            squares += f64::from(gradient.sqr()?.sum_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?);
        }
        let norm = squares.sqrt();
        if !norm.is_finite() {
            return Err(ModelError::Training {
                step: self.steps,
                reason: "the gradients are not finite; lower the learning rate".to_owned(),
            });
        }
        let AdamWConfig { betas: [beta1, beta2], eps, weight_decay, max_grad_norm } = self.config;
        let scale = if norm > max_grad_norm { max_grad_norm / norm } else { 1.0 };
        self.steps += 1;
        let t = self.steps.min(i32::MAX as u64) as i32;
        let (correction1, correction2) = (1.0 - beta1.powi(t), 1.0 - beta2.powi(t));
        for (slot, gradient) in self.slots.values_mut().zip(gradients) {
            let decay = if slot.variable.rank() > 1 { weight_decay } else { 0.0 };
            let moments = [(&mut slot.first, beta1, false), (&mut slot.second, beta2, true)];
            for (moment, beta, square) in moments {
                Moment { beta, scale, square }.update(moment, gradient)?;
            }
            Update { keep: 1.0 - rate * decay, rate: rate / correction1, correction: 1.0 / correction2, eps }.apply(
                &slot.variable,
                &slot.first,
                &slot.second,
            )?;
        }
        Ok(norm)
    }
}

/// Moves `old` towards `new`: `decay · old + (1 − decay) · new`.
pub(super) fn average(old: &Var, new: &Tensor, decay: f64) -> Result<()> {
    let mut moved = old.as_tensor().clone();
    Moment { beta: decay, scale: 1.0, square: false }.update(&mut moved, new)?;
    if !in_place(old.as_tensor()) {
        old.set(&moved)?;
    }
    Ok(())
}

/// Whether the one-pass updates are there for a tensor.
fn in_place(tensor: &Tensor) -> bool {
    tensor.device().is_cpu() && tensor.dtype() == DType::F32
}

/// `moment = beta · moment + (1 − beta) · g` with `g` the scaled gradient, or its square.
struct Moment {
    beta: f64,
    scale: f64,
    square: bool,
}

impl Moment {
    /// In place on a CPU, else by a new tensor.
    fn update(self, moment: &mut Tensor, gradient: &Tensor) -> Result<()> {
        if in_place(moment) {
            return Ok(moment.inplace_op2(gradient, &self)?);
        }
        let gradient = (gradient * self.scale)?;
        let gradient = if self.square { gradient.sqr()? } else { gradient };
        *moment = ((&*moment * self.beta)? + (gradient * (1.0 - self.beta))?)?;
        Ok(())
    }
}

impl InplaceOp2 for Moment {
    fn name(&self) -> &'static str {
        "adamw-moment"
    }

    fn cpu_fwd(&self, moment: &mut CpuStorage, at: &Layout, gradient: &CpuStorage, g_at: &Layout) -> candle_core::Result<()> {
        let gradient = range(gradient, g_at)?;
        let (beta, rest, scale) = (self.beta as f32, 1.0 - self.beta as f32, self.scale as f32);
        let chunks = range_mut(moment, at)?.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
        chunks.for_each(|(moments, gradients)| {
            for (moment, gradient) in moments.iter_mut().zip(gradients) {
                let g = gradient * scale;
                *moment = beta * *moment + rest * if self.square { g * g } else { g };
            }
        });
        Ok(())
    }
}

/// `weight = keep · weight − rate · first / (√(second · correction) + eps)`.
struct Update {
    keep: f64,
    rate: f64,
    correction: f64,
    eps: f64,
}

impl Update {
    fn apply(self, variable: &Var, first: &Tensor, second: &Tensor) -> Result<()> {
        let weight = variable.as_tensor();
        if in_place(weight) {
            return Ok(weight.inplace_op3(first, second, &self)?);
        }
        let spread = ((second * self.correction)?.sqrt()? + self.eps)?;
        let moved = ((weight * self.keep)? - ((first * self.rate)? / spread)?)?;
        Ok(variable.set(&moved.detach())?)
    }
}

impl InplaceOp3 for Update {
    fn name(&self) -> &'static str {
        "adamw-update"
    }

    fn cpu_fwd(
        &self,
        weight: &mut CpuStorage,
        at: &Layout,
        first: &CpuStorage,
        first_at: &Layout,
        second: &CpuStorage,
        second_at: &Layout,
    ) -> candle_core::Result<()> {
        let (first, second) = (range(first, first_at)?, range(second, second_at)?);
        let [keep, rate, correction, eps] = [self.keep, self.rate, self.correction, self.eps].map(|x| x as f32);
        let chunks = range_mut(weight, at)?.par_chunks_mut(CHUNK).zip(first.par_chunks(CHUNK)).zip(second.par_chunks(CHUNK));
        chunks.for_each(|((weights, first), second)| {
            for ((weight, first), second) in weights.iter_mut().zip(first).zip(second) {
                *weight = keep * *weight - rate * first / ((second * correction).sqrt() + eps);
            }
        });
        Ok(())
    }
}

fn bounds(layout: &Layout) -> candle_core::Result<std::ops::Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => candle_core::bail!("the optimiser needs contiguous tensors"),
    }
}

fn range<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    Ok(&storage.as_slice::<f32>()?[bounds(layout)?])
}

fn range_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> candle_core::Result<&'a mut [f32]> {
    match storage {
        CpuStorage::F32(values) => Ok(&mut values[bounds(layout)?]),
        _ => candle_core::bail!("the optimiser needs f32 tensors"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use candle_core::Device;

    use super::*;

    fn variables() -> BTreeMap<String, Var> {
        let device = &Device::Cpu;
        let matrix = Tensor::new(&[[1.0f32, -2.0], [3.0, 0.5]], device).unwrap();
        let vector = Tensor::new(&[0.3f32, -0.7], device).unwrap();
        BTreeMap::from([
            ("matrix".to_owned(), Var::from_tensor(&matrix).unwrap()),
            ("vector".to_owned(), Var::from_tensor(&vector).unwrap()),
        ])
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Σ c ∘ w² / 2, whose gradient is c ∘ w.
    fn gradients(variables: &BTreeMap<String, Var>) -> GradStore {
        let loss = variables
            .values()
            .map(|v| (v.as_tensor().sqr().unwrap().sum_all().unwrap() * 0.5).unwrap())
            .reduce(|a, b| (a + b).unwrap())
            .unwrap();
        loss.backward().unwrap()
    }

    fn update(optimizer: &mut AdamW, variables: &BTreeMap<String, Var>, rate: f64) -> Result<f64> {
        let gradients = optimizer.gradients(&gradients(variables))?;
        optimizer.step(&gradients, rate)
    }

    #[test]
    fn three_steps_equal_the_published_algorithm() {
        let config = AdamWConfig { betas: [0.9, 0.99], eps: 1e-6, weight_decay: 0.1, max_grad_norm: 1.5 };
        let vars = variables();
        let mut optimizer = AdamW::new(vars.clone(), config).unwrap();
        let mut weights: Vec<f64> = vec![1.0, -2.0, 3.0, 0.5, 0.3, -0.7];
        let (mut m, mut v) = (vec![0.0; 6], vec![0.0; 6]);
        for t in 1..=3 {
            let rate = 0.05 / f64::from(t);
            let norm: f64 = weights.iter().map(|w| w * w).sum::<f64>().sqrt();
            let got = update(&mut optimizer, &vars, rate).unwrap();
            assert!((got - norm).abs() < 1e-5);
            let scale = (1.5 / norm).min(1.0);
            for i in 0..6 {
                let g = weights[i] * scale;
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.99 * v[i] + 0.01 * g * g;
                let decay = if i < 4 { 0.1 } else { 0.0 };
                let (mh, vh) = (m[i] / (1.0 - 0.9f64.powi(t)), v[i] / (1.0 - 0.99f64.powi(t)));
                weights[i] -= rate * (decay * weights[i] + mh / (vh.sqrt() + 1e-6));
            }
            let now: Vec<f32> = vars.values().flat_map(|v| values(v.as_tensor())).collect();
            for (got, expected) in now.iter().zip(&weights) {
                assert!((f64::from(*got) - expected).abs() < 1e-5, "step {t}: {got} is not {expected}");
            }
        }
        assert_eq!(optimizer.steps(), 3);
    }

    #[test]
    fn restored_moments_continue_bit_for_bit() {
        let run = |stop: Option<u64>| {
            let vars = variables();
            let mut optimizer = AdamW::new(vars.clone(), AdamWConfig::default()).unwrap();
            for step in 0..6 {
                if stop == Some(step) {
                    let saved: BTreeMap<String, [Tensor; 3]> = optimizer
                        .slots()
                        .iter()
                        .map(|(name, slot)| {
                            let all = [slot.variable.as_tensor(), &slot.first, &slot.second];
                            (name.clone(), all.map(|t| t.copy().unwrap()))
                        })
                        .collect();
                    let steps = optimizer.steps();
                    let fresh: BTreeMap<String, Var> =
                        vars.iter().map(|(k, v)| (k.clone(), Var::from_tensor(&v.zeros_like().unwrap()).unwrap())).collect();
                    let mut resumed = AdamW::new(fresh.clone(), AdamWConfig::default()).unwrap();
                    resumed.restore(steps, &saved).unwrap();
                    for _ in step..6 {
                        update(&mut resumed, &fresh, 0.1).unwrap();
                    }
                    return fresh.values().flat_map(|v| values(v.as_tensor())).collect::<Vec<f32>>();
                }
                update(&mut optimizer, &vars, 0.1).unwrap();
            }
            vars.values().flat_map(|v| values(v.as_tensor())).collect()
        };
        assert_eq!(run(None), run(Some(3)));
    }

    #[test]
    fn a_missing_or_infinite_gradient_changes_nothing() {
        let vars = variables();
        let before = values(vars["matrix"].as_tensor());
        let mut optimizer = AdamW::new(vars.clone(), AdamWConfig::default()).unwrap();
        let partial = vars["matrix"].as_tensor().sum_all().unwrap().backward().unwrap();
        let error = optimizer.gradients(&partial).unwrap_err().to_string();
        assert!(error.contains("vector has no gradient"), "{error}");

        let infinite = vars
            .values()
            .map(|v| (v.as_tensor().sum_all().unwrap() * f64::MAX).unwrap())
            .reduce(|a, b| (a + b).unwrap())
            .unwrap();
        let infinite = optimizer.gradients(&infinite.backward().unwrap()).unwrap();
        assert!(optimizer.step(&infinite, 0.1).is_err());
        assert_eq!(values(vars["matrix"].as_tensor()), before);
        assert_eq!(optimizer.steps(), 0);
    }

    #[test]
    fn state_of_another_model_is_refused() {
        let mut optimizer = AdamW::new(variables(), AdamWConfig::default()).unwrap();
        assert!(optimizer.restore(1, &BTreeMap::new()).unwrap_err().to_string().contains("lacks matrix"));
        let zero = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
        let other = |name: &str| (name.to_owned(), [zero.clone(), zero.clone(), zero.clone()]);
        let saved = BTreeMap::from([other("matrix"), other("vector")]);
        assert!(optimizer.restore(1, &saved).unwrap_err().to_string().contains("matrix of shape [3]"));
        let saved = BTreeMap::from([other("stranger")]);
        assert!(optimizer.restore(1, &saved).unwrap_err().to_string().contains("stranger"));
    }
}
