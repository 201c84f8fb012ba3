//! Connections as bytes.
