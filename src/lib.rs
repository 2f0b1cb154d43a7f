//! embassy
