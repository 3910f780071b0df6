//! placeholder until the branch lands
#![allow(missing_docs)]
pub fn exact_match(_: &str, _: &[&str]) -> bool {
    todo!()
}
pub fn rouge_l(_: &str, _: &[&str]) -> f64 {
    todo!()
}
pub fn rouge_l_ids(_: &[u32], _: &[u32]) -> f64 {
    todo!()
}
