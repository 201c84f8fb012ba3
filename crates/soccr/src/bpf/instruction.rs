//! Instructions, assembled.

use std::os::fd::{AsFd, AsRawFd};

use crate::bpf::Type;
use crate::sys::bpf::Map;

/// Registers: `R0` holds results, `R1` … `R5` arguments, `R6` … `R9` survive calls, `R10` is the end of the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Register {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    R10,
}

/// How many bytes a load or store moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    Word = 0x00,
    Byte = 0x10,
    Double = 0x18,
}

/// A forward jump that has not landed yet.
#[must_use = "a jump must land"]
pub(crate) struct Jump(usize);

/// Instructions in the making.
#[derive(Debug, Default)]
pub(crate) struct Assembler(Vec<u64>);

impl Assembler {
    /// `to = *(from + offset)`.
    pub(crate) fn load(&mut self, size: Size, to: Register, from: Register, offset: i16) {
        self.push(0x61 | size as u8, to, from as u8, offset, 0);
    }

    /// `*(to + offset) = from`.
    pub(crate) fn store(&mut self, size: Size, to: Register, offset: i16, from: Register) {
        self.push(0x63 | size as u8, to, from as u8, offset, 0);
    }

    /// `to = from`.
    pub(crate) fn copy(&mut self, to: Register, from: Register) {
        self.push(0xbf, to, from as u8, 0, 0);
    }

    /// `to = value`.
    pub(crate) fn set(&mut self, to: Register, value: i32) {
        self.push(0xb7, to, 0, 0, value);
    }

    /// `to += value`.
    pub(crate) fn add(&mut self, to: Register, value: i32) {
        self.push(0x07, to, 0, 0, value);
    }

    /// `to = &map`: two instructions long, the second one without an operation.
    pub(crate) fn map(&mut self, to: Register, map: &Map) {
        const PSEUDO_MAP_FD: u8 = 1;
        self.push(0x18, to, PSEUDO_MAP_FD, 0, map.as_fd().as_raw_fd());
        self.0.push(0);
    }

    /// `R0 = helper(R1, …)`.
    pub(crate) fn call(&mut self, helper: i32) {
        self.push(0x85, Register::R0, 0, 0, helper);
    }

    /// `R0 = function(R1, …)`, a function of the kernel.
    pub(crate) fn call_kernel(&mut self, function: &Type) {
        const PSEUDO_KFUNC_CALL: u8 = 2;
        self.push(0x85, Register::R0, PSEUDO_KFUNC_CALL, 0, function.number as i32);
    }

    /// Jumps to where the jump lands, if the register is zero.
    pub(crate) fn jump_if_zero(&mut self, register: Register) -> Jump {
        self.jump(0x15, register, 0)
    }

    /// Jumps to where the jump lands, unless the register is zero.
    pub(crate) fn jump_unless_zero(&mut self, register: Register) -> Jump {
        self.jump(0x55, register, 0)
    }

    /// Jumps to where the jump lands, unless the register's lower half is `value`.
    pub(crate) fn jump_unless(&mut self, register: Register, value: u32) -> Jump {
        self.jump(0x56, register, value as i32)
    }

    fn jump(&mut self, operation: u8, register: Register, value: i32) -> Jump {
        self.push(operation, register, 0, 0, value);
        Jump(self.0.len() - 1)
    }

    /// The jump lands at the next instruction.
    pub(crate) fn land(&mut self, jump: Jump) {
        let distance = (self.0.len() - jump.0 - 1) as i16;
        self.0[jump.0] |= encode(0, 0, distance, 0);
    }

    /// Returns `R0`.
    pub(crate) fn exit(&mut self) {
        self.push(0x95, Register::R0, 0, 0, 0);
    }

    /// The finished program.
    pub(crate) fn finish(self) -> Vec<u64> {
        self.0
    }

    fn push(&mut self, operation: u8, to: Register, from: u8, offset: i16, value: i32) {
        let to = to as u8;
        let registers = if cfg!(target_endian = "little") { from << 4 | to } else { to << 4 | from };
        self.0.push(encode(operation, registers, offset, value));
    }
}

/// `struct bpf_insn`, in memory order.
fn encode(operation: u8, registers: u8, offset: i16, value: i32) -> u64 {
    let mut bytes = [operation, registers, 0, 0, 0, 0, 0, 0];
    bytes[2..4].copy_from_slice(&offset.to_ne_bytes());
    bytes[4..].copy_from_slice(&value.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn instructions_are_those_of_rfc_9669() {
        let mut program = Assembler::default();
        program.load(Size::Word, Register::R0, Register::R1, 4);
        let skip = program.jump_if_zero(Register::R0);
        program.store(Size::Byte, Register::R6, -8, Register::R0);
        program.set(Register::R0, -1);
        program.land(skip);
        program.exit();
        let bytes: Vec<_> = program.finish().into_iter().map(u64::to_ne_bytes).collect();
        assert_eq!(
            bytes,
            [
                [0x61, 0x10, 4, 0, 0, 0, 0, 0],
                [0x15, 0x00, 2, 0, 0, 0, 0, 0],
                [0x73, 0x06, 0xf8, 0xff, 0, 0, 0, 0],
                [0xb7, 0x00, 0, 0, 0xff, 0xff, 0xff, 0xff],
                [0x95, 0, 0, 0, 0, 0, 0, 0],
            ]
        );
    }
}
