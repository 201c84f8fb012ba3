//! Small BPF programs without a compiler and without kernel headers: types, offsets and kernel functions are looked
//! up in the running kernel's own description, instructions are assembled, and the result is loaded.
//!
//! # References
//! `bpf(2)`, RFC 9669 (the instruction set), `Documentation/bpf/btf.rst`.

mod btf;
mod instruction;

pub(crate) use btf::{Btf, Kind, Type, describe_map};
pub(crate) use instruction::{Assembler, Jump, Register, Size};

pub(crate) use crate::sys::bpf::{Map, MapSpec, ProgramSpec, link, load_btf, load_program, test_run};
