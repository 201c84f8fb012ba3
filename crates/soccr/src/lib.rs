//! soccr
