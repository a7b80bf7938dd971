//! Where tensors live.

pub use candle_core::{DType, Device};

use crate::error::{ModelError, Result};

/// The device named `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// The name is unknown, or this build or machine has no such device.
pub fn device(name: &str) -> Result<Device> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    let number = match name.strip_prefix("cuda") {
        Some("") => Some(0),
        Some(rest) => rest.strip_prefix(':').and_then(|n| n.parse().ok()),
        None => None,
    };
    let number = number.ok_or_else(|| ModelError::Config(format!("no device `{name}`; use cpu, cuda or cuda:N")))?;
    Ok(Device::new_cuda(number)?)
}
