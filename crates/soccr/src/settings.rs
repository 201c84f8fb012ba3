//! The socket options that travel with a connection.

/// The value of a socket option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// An `int`.
    Number(i32),
    /// Anything else, as `getsockopt` gave it.
    Bytes(Vec<u8>),
}

/// The socket options of a connection, by name, in the order in which they were read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings(Vec<(std::borrow::Cow<'static, str>, Value)>);

impl Settings {
    /// The options and their values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(name, value)| (name.as_ref(), value))
    }

    /// The value of an option.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.iter().find(|(known, _)| *known == name).map(|(_, value)| value)
    }

    /// Adds an option by its kernel name, such as `TCP_NODELAY`.
    pub fn push(&mut self, name: impl Into<std::borrow::Cow<'static, str>>, value: Value) {
        self.0.push((name.into(), value));
    }
}
