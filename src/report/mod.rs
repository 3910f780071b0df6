//! Pictures of what training made, as text that a browser shows.

pub mod dendrogram;
pub mod heat_map;
pub mod page;
pub mod routing;
pub mod tensorboard;
