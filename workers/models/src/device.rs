//! Where tensors live.

pub use candle_core::{DType, Device};

use crate::error::{ModelError, Result};

/// Leaves all work on the CPU to one pool of threads, rayon's. candle would divide additions and the like among threads of its own, which go on
/// spinning while the others work. Only before any other thread has started.
#[allow(unsafe_code, reason = "the environment is where candle looks for it")]
pub fn share_threads() {
    const THREADS: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(THREADS).is_none() {
        // SAFETY: no other thread is there to read the environment at the same time.
        unsafe { std::env::set_var(THREADS, "1") };
    }
}

/// The device named `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// The name is unknown, or this build or machine has no such device.
pub fn device(name: &str) -> Result<Device> {
    match place(name)? {
        Place::Cpu => Ok(Device::Cpu),
        Place::Cuda(number) => {
            built_for(name)?;
            Ok(Device::new_cuda(number)?)
        }
    }
}

/// Checks that `name` is one that [`device`] knows, in whatever build.
///
/// # Errors
/// It is not.
pub fn check_name(name: &str) -> Result<()> {
    place(name).map(|_| ())
}

/// Checks that this build can work on the device `name`, whether or not this machine has it.
///
/// # Errors
/// The name is unknown, or the feature of the build that is missing.
pub fn built_for(name: &str) -> Result<()> {
    match place(name)? {
        Place::Cuda(_) if !cfg!(feature = "cuda") => {
            let reason = "this program was built for CPUs alone; build it with `--features cuda`";
            Err(ModelError::Device { name: name.to_owned(), reason })
        }
        _ => Ok(()),
    }
}

enum Place {
    Cpu,
    Cuda(usize),
}

fn place(name: &str) -> Result<Place> {
    if name == "cpu" {
        return Ok(Place::Cpu);
    }
    let number = match name.strip_prefix("cuda") {
        Some("") => Some(0),
        Some(rest) => rest.strip_prefix(':').and_then(|n| n.parse().ok()),
        None => None,
    };
    let unknown = || ModelError::Device { name: name.to_owned(), reason: "there are cpu, cuda and cuda:N" };
    number.map(Place::Cuda).ok_or_else(unknown)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn devices_are_named_and_a_missing_feature_too() {
        assert!(device("cpu").unwrap().is_cpu());
        for name in ["cuda", "cuda:1"] {
            check_name(name).unwrap();
        }
        for name in ["", "gpu", "cuda1", "cuda:", "cuda:x", "CPU"] {
            let said = device(name).unwrap_err().to_string();
            assert!(said.contains(&format!("`{name}`")) && said.contains("cuda:N"), "{said}");
        }
        if !cfg!(feature = "cuda") {
            let said = device("cuda:1").unwrap_err().to_string();
            assert!(said.contains("`cuda:1`") && said.contains("--features cuda"), "{said}");
        }
    }
}
