//! The texts of a batch in groups of like length. A batch is as wide as its longest text, and what texts are padded with is computed as they are; texts
//! of the web differ much in length.

use candle_core::{Device, Tensor};

use crate::error::Result;
use crate::tokenizer::TextBatch;

/// Texts that a group has at least: so many rows are a product worth its while.
const LEAST: usize = 32;
/// Groups at most: each adds its own gradients of all weights.
const MOST: usize = 4;

/// Groups have no more than this share of the tokens that one batch would have, or there is only one.
const WORTHWHILE: f64 = 0.9;

/// Texts, given as ids, in groups.
pub(super) struct TextGroups {
    groups: Vec<TextGroup>,
    /// Where each text is among the groups', one after the other; none if they are in order.
    places: Option<Tensor>,
}

/// Texts that are computed together.
pub(super) struct TextGroup {
    /// Their numbers.
    pub(super) rows: Vec<usize>,
    /// `(rows, t)`, padded to the longest of them.
    pub(super) ids: Tensor,
    /// `(rows, t)`, 0 at padding.
    pub(super) mask: Tensor,
}

impl TextGroups {
    /// Groups of texts; on a GPU, which computes them all at once, only one.
    pub(super) fn new(texts: &[&[u32]], pad: u32, device: &Device) -> Result<Self> {
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|&row| texts[row].len());
        let mut count = if device.is_cpu() { (texts.len() / LEAST).clamp(1, MOST) } else { 1 };
        let size = texts.len().div_ceil(count).max(1);
        let width = |rows: &[usize]| rows.last().map_or(0, |&row| texts[row].len());
        let grouped: usize = order.chunks(size).map(|rows| rows.len() * width(rows)).sum();
        if grouped as f64 > WORTHWHILE * (texts.len() * width(&order)) as f64 {
            count = 1;
        }
        if count == 1 {
            order.sort_unstable();
        }
        let group = |rows: &[usize]| {
            let of_group: Vec<&[u32]> = rows.iter().map(|&row| texts[row]).collect();
            let (ids, mask) = TextBatch::pad(&of_group, 0, pad).tensors(device)?;
            Ok(TextGroup { rows: rows.to_vec(), ids, mask })
        };
        let groups = order.chunks(texts.len().div_ceil(count).max(1)).map(group).collect::<Result<Vec<_>>>()?;
        let mut places = vec![0_u32; order.len()];
        for (place, &row) in order.iter().enumerate() {
            places[row] = place as u32;
        }
        let places = if count > 1 { Some(Tensor::new(places, device)?) } else { None };
        Ok(Self { groups, places })
    }

    pub(super) fn groups(&self) -> &[TextGroup] {
        &self.groups
    }

    /// What `forward` makes of the groups, `(rows, n)` each, in the order of the texts.
    pub(super) fn forward(&self, forward: impl Fn(&TextGroup) -> Result<Tensor>) -> Result<Tensor> {
        let made = Tensor::cat(&self.groups.iter().map(forward).collect::<Result<Vec<_>>>()?, 0)?;
        self.places.as_ref().map_or(Ok(made.clone()), |places| Ok(made.index_select(places, 0)?))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn texts_come_back_in_their_order_from_groups_no_wider_than_they_need() {
        let texts: Vec<Vec<u32>> = (0..70_u32).map(|i| vec![i; 2 + (i as usize * 7) % 13]).collect();
        let texts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
        let groups = TextGroups::new(&texts, 0, &Device::Cpu).unwrap();
        let widths: Vec<usize> = groups.groups().iter().map(|group| group.ids.dim(1).unwrap()).collect();
        assert_eq!(widths, [8, 14]);
        let first = groups.forward(|group| Ok(group.ids.narrow(1, 0, 1)?)).unwrap();
        assert_eq!(first.flatten_all().unwrap().to_vec1::<u32>().unwrap(), (0..70).collect::<Vec<_>>());
        // Too few texts, and texts that are as long as each other.
        let alike = [texts[3]; 70];
        for (texts, count) in [(&texts[..40], 40), (&alike[..], 70)] {
            let one = TextGroups::new(texts, 0, &Device::Cpu).unwrap();
            assert_eq!((one.groups().len(), &one.groups()[0].rows), (1, &(0..count).collect()));
        }
    }
}
