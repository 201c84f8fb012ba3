//! The log: one callback for the process, C-variadic, with a level up to which it wants lines.

use std::ffi::{CStr, CString, c_char, c_uint};
use std::sync::{PoisonError, RwLock};

use super::cancel::WithoutCancellation;

/// `void (*)(unsigned int level, const char *format, ...)`.
pub(crate) type Callback = unsafe extern "C" fn(c_uint, *const c_char, ...);

/// `SOCCR_LOG_ERR`.
pub(crate) const ERROR: c_uint = 1;
/// `SOCCR_LOG_DBG`.
pub(crate) const DEBUG: c_uint = 2;

static LOG: RwLock<Option<(c_uint, Callback)>> = RwLock::new(None);

pub(crate) fn set(level: c_uint, callback: Option<Callback>) {
    *LOG.write().unwrap_or_else(PoisonError::into_inner) = callback.map(|callback| (level, callback));
}

/// Writes one line, without holding the lock: the callback may call the library.
pub(crate) fn line(level: c_uint, text: impl FnOnce() -> String) {
    let log = *LOG.read().unwrap_or_else(PoisonError::into_inner);
    let Some((_, callback)) = log.filter(|(highest, _)| level <= *highest) else { return };
    let line = c_string(format!("{}\n", text()));
    let format: &CStr = c"%s";
    // A thread that ended in the callback would unwind through the library.
    let _uncancelled = WithoutCancellation::new();
    // SAFETY: the callback has this type by its contract; both strings end in NUL and outlive the call.
    unsafe { callback(level, format.as_ptr(), line.as_ptr()) }
}

/// Text for C, in the characters that every log can show, up to a NUL if there is one.
pub(crate) fn c_string(text: String) -> CString {
    let ascii = |character| match character {
        '—' | '–' | '−' => '-',
        character if character.is_ascii() => character,
        _ => '?',
    };
    let text = if text.is_ascii() { text } else { text.chars().map(ascii).collect() };
    CString::new(text).unwrap_or_else(|error| {
        let end = error.nul_position();
        let mut bytes = error.into_vec();
        bytes.truncate(end);
        CString::new(bytes).unwrap_or_default()
    })
}
