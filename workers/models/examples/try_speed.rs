#![allow(clippy::unwrap_used, missing_docs, clippy::print_stdout, clippy::expect_used)]
use candle_core::Tensor;
use candle_nn::VarBuilder;
use capfilt_models::config::MedConfig;
use capfilt_models::device::{DType, Device};
use capfilt_models::layers::Linear;
use capfilt_models::med::{Med, Parts};
use capfilt_models::ops::Precision;
use capfilt_models::parameters::fresh_tensors;
use std::time::Instant;
fn time(n: usize, mut f: impl FnMut()) -> f64 {
    f();
    let b = Instant::now();
    for _ in 0..n {
        f();
    }
    b.elapsed().as_secs_f64() / n as f64
}
fn main() {
    let cpu = Device::Cpu;
    for (m, k, n) in [(2308, 768, 3072), (2308, 3072, 768), (16, 768, 3072), (577, 768, 2304), (4096, 4096, 4096)] {
        let x = Tensor::randn(0f32, 1., (m, k), &cpu).unwrap();
        let w = Tensor::randn(0f32, 0.02, (n, k), &cpu).unwrap();
        let b = Tensor::zeros(n, DType::F32, &cpu).unwrap();
        let plain = Linear::new(w, b).unwrap();
        let exact = plain.forward(&x).unwrap();
        let fl = 2.0 * (m * k * n) as f64 / 1e9;
        print!(
            "{m} {k} {n}: f32 {:.1}",
            fl / time(3, || {
                plain.forward(&x).unwrap();
            })
        );
        for p in [Precision::Bf16, Precision::Bf16x3] {
            let mut l = plain.clone();
            l.pack(p).unwrap();
            let y = l.forward(&x).unwrap();
            let norm = exact.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            let err = (y - &exact).unwrap().sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt() / norm;
            print!(
                "  {p:?} {:.1} (error {err:.1e})",
                fl / time(10, || {
                    l.forward(&x).unwrap();
                })
            );
        }
        println!(" GFLOP/s");
    }
    let mut c = MedConfig::base();
    c.text_config.vocab_size = 30524;
    let t = fresh_tensors(&c, Parts::FILTER, 1, &cpu).unwrap();
    let vb = VarBuilder::from_tensors(t.into_iter().collect(), DType::F32, &cpu);
    let med = Med::load(&c, vb, Parts::FILTER).unwrap();
    let px: Vec<_> = (0..4)
        .map(|n| {
            capfilt_models::preprocess::Pixels::new(
                384,
                (0..3 * 384 * 384).map(|i| ((n * 7919 + i * 104_729) % 1000) as f32 / 500.0 - 1.0).collect(),
            )
            .unwrap()
        })
        .collect();
    let exact = med.encode_images(&px).unwrap();
    println!(
        "encode f32: {:.3} s/image",
        time(1, || {
            med.encode_images(&px).unwrap();
        }) / 4.0
    );
    for p in [Precision::Bf16x3, Precision::Bf16] {
        let mut m = med.clone();
        m.pack(p).unwrap();
        let y = m.encode_images(&px).unwrap();
        let d = (&y - &exact).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        let a = exact.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        println!(
            "encode {p:?}: {:.3} s/image, max error {:.1e}",
            time(3, || {
                m.encode_images(&px).unwrap();
            }) / 4.0,
            d / a
        );
        println!(
            "cross cache {p:?}: {:.3} s/image",
            time(3, || {
                m.encoder_cross_cache(&exact).unwrap();
            }) / 4.0
        );
    }
}
