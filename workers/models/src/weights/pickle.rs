//! Just as much of Python's pickle format as `torch.save` writes for dictionaries of tensors: protocol 2 and the opcodes that 4 adds.
//!
//! A pickle is a program. This reader runs no function that it names: it knows how tensors are put together and takes everything else
//! for an opaque value. Values refer to each other by number, so that a pickle that names one value many times, or nests values
//! deeply, costs no more than its length.

use std::collections::HashMap;
use std::str::from_utf8;

use safetensors::Dtype;

/// The most dimensions of a tensor.
const MAX_DIMENSIONS: usize = 8;

/// A pickled value; texts and the like point into the pickle.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    Text(&'a str),
    Int(i64),
    /// Position in [`Pickle::tuples`].
    Tuple(usize),
    /// Position in [`Pickle::dicts`].
    Dict(usize),
    /// Position in [`Pickle::storages`].
    Storage(usize),
    /// Position in [`Pickle::tensors`].
    Tensor(usize),
    /// Module and name of something that Python would look up.
    Global(&'a str, &'a str),
    /// Anything that no tensor is made of.
    Opaque,
}

/// A run of numbers that tensors look into.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Storage<'a> {
    /// The name of its file below `data/`.
    pub(super) key: &'a str,
    /// The type of its numbers; none for one that no tensor of ours could have.
    pub(super) dtype: Option<Dtype>,
}

/// A view of a storage.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct View<'a> {
    pub(super) storage: Storage<'a>,
    /// Where it starts, in numbers.
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    /// Steps between neighbours in each dimension, in numbers.
    pub(super) stride: Vec<usize>,
}

/// All values of a pickle.
#[derive(Debug, Default)]
pub(super) struct Pickle<'a> {
    tuples: Vec<Vec<Value<'a>>>,
    dicts: Vec<Vec<(Value<'a>, Value<'a>)>>,
    storages: Vec<Storage<'a>>,
    tensors: Vec<View<'a>>,
    /// What was put into lists, in order.
    listed: Vec<Value<'a>>,
    /// What it is a pickle of.
    root: Option<Value<'a>>,
}

impl<'a> Pickle<'a> {
    /// Reads a pickle.
    ///
    /// # Errors
    /// What in it cannot be read, and where.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, String> {
        Ok(Self::read_first(bytes)?.0)
    }

    /// Reads the pickle that some bytes begin with, and says how many of them it is.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub(super) fn read_first(bytes: &'a [u8]) -> Result<(Self, usize), String> {
        let mut machine =
            Machine { bytes, at: 0, stack: Vec::new(), marks: Vec::new(), memo: HashMap::new(), pickle: Self::default() };
        loop {
            let at = machine.at;
            match machine.step() {
                Ok(true) => {}
                Ok(false) => return Ok((machine.pickle, machine.at)),
                Err(what) => return Err(format!("{what} at byte {at} of the pickle")),
            }
        }
    }

    /// The texts that were put into lists, in order.
    pub(super) fn listed_texts(&self) -> impl Iterator<Item = &'a str> {
        self.listed.iter().filter_map(|value| if let Value::Text(text) = value { Some(*text) } else { None })
    }

    /// Every run of numbers that it names, as often as it does.
    pub(super) fn storages(&self) -> &[Storage<'a>] {
        &self.storages
    }

    /// The state dict in it, by name: the dictionary that it is, or that it keeps under `state_dict` or `model`, as training scripts
    /// do. What is no tensor is left out.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn state_dict(self) -> Result<Vec<(&'a str, View<'a>)>, String> {
        let Some(Value::Dict(root)) = self.root else { return Err("it holds no dictionary of tensors".to_owned()) };
        let inner = |key: &str| {
            self.dicts[root].iter().find_map(|(k, v)| match v {
                Value::Dict(dict) if *k == Value::Text(key) => Some(*dict),
                _ => None,
            })
        };
        let dict = ["state_dict", "model"].into_iter().find_map(inner).unwrap_or(root);
        let named = self.dicts[dict].iter().filter_map(|entry| match entry {
            (Value::Text(name), Value::Tensor(number)) => Some((*name, self.tensors[*number].clone())),
            _ => None,
        });
        let named: Vec<_> = named.collect();
        if named.is_empty() {
            return Err("it holds no dictionary of tensors".to_owned());
        }
        Ok(named)
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value<'a>>,
    /// Heights of the stack where marks were set.
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    pickle: Pickle<'a>,
}

impl<'a> Machine<'a> {
    /// One opcode; false at the end. Names are those of Python's `pickletools`.
    fn step(&mut self) -> Result<bool, String> {
        match self.byte()? {
            // PROTO, FRAME
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            // MARK, STOP, POP
            b'(' => self.marks.push(self.stack.len()),
            b'.' => {
                self.pickle.root = Some(self.pop()?);
                return Ok(false);
            }
            b'0' => drop(self.pop()?),
            // NONE, NEWTRUE, NEWFALSE, BINFLOAT
            b'N' | 0x88 | 0x89 => self.stack.push(Value::Opaque),
            b'G' => {
                self.take(8)?;
                self.stack.push(Value::Opaque);
            }
            // BININT, BININT1, BININT2, LONG1
            b'J' => {
                let value = i64::from(i32::from_le_bytes(self.array()?));
                self.stack.push(Value::Int(value));
            }
            b'K' => {
                let value = self.byte()?;
                self.stack.push(Value::Int(i64::from(value)));
            }
            b'M' => {
                let value = u16::from_le_bytes(self.array()?);
                self.stack.push(Value::Int(i64::from(value)));
            }
            0x8a => {
                let length = usize::from(self.byte()?);
                let value = long(self.take(length)?);
                self.stack.push(value);
            }
            // BINUNICODE, SHORT_BINUNICODE
            b'X' => {
                let length = u32::from_le_bytes(self.array()?) as usize;
                let value = self.text(length)?;
                self.stack.push(value);
            }
            0x8c => {
                let length = usize::from(self.byte()?);
                let value = self.text(length)?;
                self.stack.push(value);
            }
            // GLOBAL, STACK_GLOBAL
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.stack.push(Value::Global(module, name));
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Value::Text(module), Value::Text(name)) = (module, name) else {
                    return Err("a name that is no text".to_owned());
                };
                self.stack.push(Value::Global(module, name));
            }
            // EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3, TUPLE
            b')' => self.tuple(0)?,
            0x85 => self.tuple(1)?,
            0x86 => self.tuple(2)?,
            0x87 => self.tuple(3)?,
            b't' => {
                let above = self.above_mark()?;
                self.tuple(above)?;
            }
            // EMPTY_LIST, EMPTY_SET; APPEND; APPENDS, ADDITEMS: no tensor is made of lists.
            b']' | 0x8f => self.stack.push(Value::Opaque),
            b'a' => {
                let item = self.pop()?;
                self.pickle.listed.push(item);
            }
            b'e' | 0x90 => {
                let above = self.above_mark()?;
                let items = self.drain(above)?;
                self.pickle.listed.extend(items);
            }
            // EMPTY_DICT, DICT, SETITEM, SETITEMS
            b'}' => self.dict(),
            b'd' => {
                let above = self.above_mark()?;
                let items = self.drain(above)?;
                self.dict();
                self.set(&items)?;
            }
            b's' => {
                let items = self.drain(2)?;
                self.set(&items)?;
            }
            b'u' => {
                let above = self.above_mark()?;
                let items = self.drain(above)?;
                self.set(&items)?;
            }
            // BINPUT, LONG_BINPUT, MEMOIZE, BINGET, LONG_BINGET
            b'q' => {
                let number = u32::from(self.byte()?);
                self.put(number)?;
            }
            b'r' => {
                let number = u32::from_le_bytes(self.array()?);
                self.put(number)?;
            }
            0x94 => self.put(u32::try_from(self.memo.len()).map_err(|e| e.to_string())?)?,
            b'h' => {
                let number = u32::from(self.byte()?);
                self.get(number)?;
            }
            b'j' => {
                let number = u32::from_le_bytes(self.array()?);
                self.get(number)?;
            }
            // BINPERSID, REDUCE, NEWOBJ, BUILD
            b'Q' => {
                let value = self.pop()?;
                let storage = self.storage(value);
                self.stack.push(storage);
            }
            b'R' => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                let made = self.call(function, arguments)?;
                self.stack.push(made);
            }
            0x81 => {
                self.drain(2)?;
                self.stack.push(Value::Opaque);
            }
            // Attributes of a dictionary (torch notes versions there) are none of its items.
            b'b' => drop(self.pop()?),
            code => return Err(format!("opcode {code:#04x}, which torch.save does not write,")),
        }
        Ok(true)
    }

    /// What calling `function` would give, for the functions that tensors are made by.
    fn call(&mut self, function: Value<'a>, arguments: Value<'a>) -> Result<Value<'a>, String> {
        let Value::Tuple(arguments) = arguments else { return Ok(Value::Opaque) };
        let arguments: Vec<_> = self.pickle.tuples[arguments].iter().copied().take(4).collect();
        match (function, arguments.as_slice()) {
            (Value::Global("collections", "OrderedDict"), _) => {
                self.dict();
                self.pop()
            }
            (
                Value::Global("torch._utils", "_rebuild_tensor_v2"),
                [Value::Storage(storage), Value::Int(offset), Value::Tuple(shape), Value::Tuple(stride), ..],
            ) => {
                let sizes = |tuple: usize| {
                    let tuple = &self.pickle.tuples[tuple];
                    if tuple.len() > MAX_DIMENSIONS {
                        return Err(format!("a tensor of {} dimensions", tuple.len()));
                    }
                    tuple.iter().map(|v| size(*v)).collect::<Result<Vec<_>, _>>()
                };
                let (shape, stride) = (sizes(*shape)?, sizes(*stride)?);
                if shape.len() != stride.len() {
                    return Err("a tensor with other steps than dimensions".to_owned());
                }
                let view = View { storage: self.pickle.storages[*storage], offset: size(Value::Int(*offset))?, shape, stride };
                self.pickle.tensors.push(view);
                Ok(Value::Tensor(self.pickle.tensors.len() - 1))
            }
            (Value::Global("torch._utils", "_rebuild_parameter"), [tensor @ Value::Tensor(_), ..]) => Ok(*tensor),
            _ => Ok(Value::Opaque),
        }
    }

    /// `("storage", type, key, device, length)`
    fn storage(&mut self, id: Value<'a>) -> Value<'a> {
        let Value::Tuple(tuple) = id else { return Value::Opaque };
        let &[Value::Text("storage"), Value::Global("torch", class), Value::Text(key), ..] = &self.pickle.tuples[tuple][..]
        else {
            return Value::Opaque;
        };
        let dtype = match class {
            "FloatStorage" => Some(Dtype::F32),
            "HalfStorage" => Some(Dtype::F16),
            "BFloat16Storage" => Some(Dtype::BF16),
            "DoubleStorage" => Some(Dtype::F64),
            "LongStorage" => Some(Dtype::I64),
            "IntStorage" => Some(Dtype::I32),
            "ShortStorage" => Some(Dtype::I16),
            "CharStorage" => Some(Dtype::I8),
            "ByteStorage" => Some(Dtype::U8),
            "BoolStorage" => Some(Dtype::BOOL),
            _ => None,
        };
        self.pickle.storages.push(Storage { key, dtype });
        Value::Storage(self.pickle.storages.len() - 1)
    }

    fn tuple(&mut self, length: usize) -> Result<(), String> {
        let items = self.drain(length)?;
        self.pickle.tuples.push(items);
        self.stack.push(Value::Tuple(self.pickle.tuples.len() - 1));
        Ok(())
    }

    fn dict(&mut self) {
        self.pickle.dicts.push(Vec::new());
        self.stack.push(Value::Dict(self.pickle.dicts.len() - 1));
    }

    /// Adds keys and values to the dictionary on the stack; other objects may have items too, which are not looked at.
    fn set(&mut self, items: &[Value<'a>]) -> Result<(), String> {
        if let Value::Dict(dict) = *self.stack.last().ok_or("an empty stack")? {
            self.pickle.dicts[dict].extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
        }
        Ok(())
    }

    fn put(&mut self, number: u32) -> Result<(), String> {
        self.memo.insert(number, *self.stack.last().ok_or("an empty stack")?);
        Ok(())
    }

    fn get(&mut self, number: u32) -> Result<(), String> {
        self.stack.push(*self.memo.get(&number).ok_or_else(|| format!("no value {number}"))?);
        Ok(())
    }

    /// How many values lie above the last mark, which goes.
    fn above_mark(&mut self) -> Result<usize, String> {
        let mark = self.marks.pop().ok_or("no mark")?;
        self.stack.len().checked_sub(mark).ok_or_else(|| "a mark above the stack".to_owned())
    }

    fn drain(&mut self, length: usize) -> Result<Vec<Value<'a>>, String> {
        let rest = self.stack.len().checked_sub(length).ok_or("an empty stack")?;
        Ok(self.stack.split_off(rest))
    }

    fn pop(&mut self) -> Result<Value<'a>, String> {
        self.stack.pop().ok_or_else(|| "an empty stack".to_owned())
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let taken = self.bytes[self.at..].get(..length).ok_or("an end in the middle of a value")?;
        self.at += length;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.array::<1>()?[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.take(N)?.try_into().map_err(|_| "an end in the middle of a value".to_owned())
    }

    fn text(&mut self, length: usize) -> Result<Value<'a>, String> {
        from_utf8(self.take(length)?).map(Value::Text).map_err(|e| e.to_string())
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(|b| *b == b'\n').ok_or("a name without an end")?;
        self.at += length + 1;
        from_utf8(&rest[..length]).map_err(|e| e.to_string())
    }
}

/// A number in little-endian two's complement; one that is wider than 64 bits is no size of a tensor.
fn long(bytes: &[u8]) -> Value<'static> {
    if bytes.len() > 8 {
        return Value::Opaque;
    }
    let fill = if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 };
    let mut wide = [fill; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    Value::Int(i64::from_le_bytes(wide))
}

fn size(value: Value<'_>) -> Result<usize, String> {
    let number = if let Value::Int(number) = value { usize::try_from(number).ok() } else { None };
    number.ok_or_else(|| "a tensor whose size is no natural number".to_owned())
}
