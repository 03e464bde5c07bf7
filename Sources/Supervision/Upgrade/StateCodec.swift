import ControlProtocol
import HostSystem
import Sandbox

/// What states consist of, beyond the fields of control messages.
extension WireWriter {
  mutating func optional<Value>(_ value: Value?, _ write: (inout WireWriter, Value) -> Void) {
    flag(value != nil)
    if let value { write(&self, value) }
  }

  mutating func time(_ value: MonotonicTime) { number(value.nanoseconds) }

  mutating func identity(_ value: ChildIdentity) {
    number(value.uid)
    number(value.gid)
  }

  mutating func texts(_ values: [String]) { list(values) { $0.text($1) } }

  /// A packet of the control channel, or other bytes, whole.
  mutating func packet(_ bytes: [UInt8]) { list(bytes) { $0.number($1) } }

  mutating func rules(_ rules: [SystemCallRule]) {
    list(rules) { writer, rule in
      writer.number(rule.number)
      writer.number(rule.failure ?? 0)
      writer.list(rule.conditions) { writer, condition in
        writer.number(UInt8(condition.argument))
        switch condition.test {
        case .ownProcess: writer.number(UInt8(0))
        case .masked(let mask, let value):
          writer.number(UInt8(1))
          writer.number(mask)
          writer.number(value)
        case .anyOf(let values):
          writer.number(UInt8(2))
          writer.list(values) { $0.number($1) }
        }
      }
    }
  }
}

extension WireReader {
  mutating func optional<Value>(
    _ name: MessageError.StaticName, _ read: (inout WireReader) throws(MessageError) -> Value
  ) throws(MessageError) -> Value? {
    try flag(name) ? try read(&self) : nil
  }

  /// One to which something can be added as long as there are VMs.
  mutating func counter(_ name: MessageError.StaticName) throws(MessageError) -> UInt64 {
    let number: UInt64 = try number()
    guard number < 1 << 62 else { throw .badField(name) }
    return number
  }

  mutating func time() throws(MessageError) -> MonotonicTime { MonotonicTime(nanoseconds: try counter("time")) }

  /// The first of a VM's ids.
  mutating func identityBase() throws(MessageError) -> UInt32? {
    let base = try optional("identities") { reader throws(MessageError) in try reader.number(UInt32.self) }
    if let base, base > UInt32.max - Identities.perVM { throw .badField("identities") }
    return base
  }

  mutating func identity() throws(MessageError) -> ChildIdentity { ChildIdentity(uid: try number(), gid: try number()) }

  mutating func texts(_ name: MessageError.StaticName, limit: Int) throws(MessageError) -> [String] {
    try list(name, limit: limit) { reader throws(MessageError) in try reader.text(name) }
  }

  mutating func packet(_ name: MessageError.StaticName, limit: Int = Wire.maximumLength) throws(MessageError) -> [UInt8] {
    try list(name, limit: limit) { reader throws(MessageError) in try reader.number(UInt8.self) }
  }

  /// The number of a descriptor that was handed on: none of the first three.
  mutating func descriptor(_ name: MessageError.StaticName) throws(MessageError) -> CInt {
    let number = try number(UInt32.self)
    guard (3..<4096).contains(number) else { throw .badField(name) }
    return CInt(number)
  }

  /// A process id.
  mutating func processID(_ name: MessageError.StaticName) throws(MessageError) -> Int32 {
    guard let number = Int32(exactly: try number(UInt32.self)), number > 0 else { throw .badField(name) }
    return number
  }

  mutating func rules(_ name: MessageError.StaticName) throws(MessageError) -> [SystemCallRule] {
    try list(name, limit: 256) { reader throws(MessageError) in
      let number = try reader.number(UInt32.self)
      let failure = try reader.number(UInt16.self)
      let conditions = try reader.list(name, limit: 6) { reader throws(MessageError) -> SystemCallRule.Condition in
        let argument = Int(try reader.number(UInt8.self))
        guard argument < 6 else { throw .badField(name) }
        switch try reader.number(UInt8.self) {
        case 0: return SystemCallRule.Condition(argument: argument, test: .ownProcess)
        case 1: return SystemCallRule.Condition(argument: argument, test: .masked(try reader.number(), equals: try reader.number()))
        case 2:
          let values = try reader.list(name, limit: 256) { reader throws(MessageError) in try reader.number(UInt64.self) }
          return SystemCallRule.Condition(argument: argument, test: .anyOf(values))
        default: throw .badField(name)
        }
      }
      // Each combination becomes instructions of a filter.
      var combinations = 1
      for case .anyOf(let values) in conditions.map(\.test) {
        combinations *= values.count
        guard combinations <= SystemCallRule.mostCombinations else { throw .badField(name) }
      }
      return SystemCallRule(number: number, conditions: conditions, reason: "in force", failure: failure == 0 ? nil : failure)
    }
  }
}

extension SystemCallRule {
  /// Whether a process behind `rules` may do what `needed` allows: the same rule stands there, or one without conditions.
  static func covers(_ rules: [SystemCallRule], _ needed: SystemCallRule) -> Bool {
    rules.contains { rule in
      guard rule.number == needed.number else { return false }
      // A call that is answered with an error must not kill; it may also be carried out.
      if needed.failure != nil { return rule.failure != nil || rule.conditions.isEmpty }
      return rule.failure == nil && (rule.conditions.isEmpty || rule.conditions == needed.conditions)
    }
  }
}

extension WireWriter {
  mutating func changes(_ changes: [DeviceChange]) {
    list(changes) { writer, change in
      writer.text(change.id)
      switch change.step {
      case .added(let order):
        writer.number(UInt8(0))
        writer.text(order.kind.rawValue)
        writer.text(order.value)
      case .removed: writer.number(UInt8(1))
      case .served(.socket(let path)):
        writer.number(UInt8(2))
        writer.text(path)
      case .served(.program(let program)):
        writer.number(UInt8(3))
        writer.texts(program.words)
        writer.text(program.profile)
        writer.optional(program.path) { $0.text($1) }
      case .image(let image):
        writer.number(UInt8(4))
        writer.text(image.path)
        writer.flag(image.readOnly)
        writer.flag(image.isShared)
        writer.optional(image.serial) { $0.text($1) }
        writer.texts(image.arguments)
      }
    }
  }

  mutating func groups(_ groups: ControlGroups.Known?) {
    optional(groups) { writer, known in
      writer.text(known.parent)
      writer.text(known.name)
      writer.texts(known.controllers.map(\.rawValue))
      writer.optional(known.ownName) { $0.text($1) }
    }
  }

  mutating func extraArguments(_ extra: [String: [String]]) {
    list(extra.sorted { $0.key < $1.key }) { writer, extra in
      writer.text(extra.key)
      writer.texts(extra.value)
    }
  }
}

extension WireReader {
  private mutating func path(_ name: MessageError.StaticName) throws(MessageError) -> String {
    let path = try text(name)
    guard VMConfiguration.isPath(path) else { throw .badField(name) }
    return path
  }

  mutating func changes() throws(MessageError) -> [DeviceChange] {
    try list("changes", limit: 256) { reader throws(MessageError) in
      let id = try reader.identifier()
      switch try reader.number(UInt8.self) {
      case 0:
        guard let kind = DeviceOrder.Kind(rawValue: try reader.text("changes", limit: 64)) else { throw .badField("changes") }
        return DeviceChange(id: id, step: .added(DeviceOrder(kind, try reader.text("changes"))))
      case 1: return DeviceChange(id: id, step: .removed)
      case 2:
        let path = try reader.path("changes")
        guard VMConfiguration.isSocketPath(path) else { throw .badField("changes") }
        return DeviceChange(id: id, step: .served(.socket(path)))
      case 3:
        let words = try reader.texts("changes", limit: 256)
        guard !words.isEmpty else { throw .badField("changes") }
        let profile = try reader.path("changes")
        let path = try reader.optional("changes") { reader throws(MessageError) in try reader.path("changes") }
        return DeviceChange(id: id, step: .served(.program(.init(words: words, profile: profile, path: path))))
      case 4:
        return DeviceChange(
          id: id,
          step: .image(
            .init(
              path: try reader.path("changes"), readOnly: try reader.flag("changes"), isShared: try reader.flag("changes"),
              serial: try reader.optional("changes") { reader throws(MessageError) in try reader.text("changes", limit: 20) },
              arguments: try reader.texts("changes", limit: 64))))
      default: throw .badField("changes")
      }
    }
  }

  mutating func groups() throws(MessageError) -> ControlGroups.Known? {
    try optional("groups") { reader throws(MessageError) in
      /// One step below the parent.
      func name(_ reader: inout WireReader) throws(MessageError) -> String {
        let name = try reader.text("groups", limit: 255)
        guard name.hasPrefix(ControlGroups.prefix), !name.utf8.contains(UInt8(ascii: "/")), !name.utf8.contains(0) else {
          throw .badField("groups")
        }
        return name
      }
      let parent = try reader.path("groups")
      let group = try name(&reader)
      let controllers = try reader.list("groups", limit: 8) { reader throws(MessageError) in
        guard let controller = ControlGroups.Controller(rawValue: try reader.text("groups", limit: 16)) else { throw .badField("groups") }
        return controller
      }
      let ownName = try reader.optional("groups") { reader throws(MessageError) in try name(&reader) }
      return ControlGroups.Known(parent: parent, name: group, controllers: controllers, ownName: ownName)
    }
  }

  mutating func extraArguments() throws(MessageError) -> [String: [String]] {
    let all = try list("extraArguments", limit: 256) { reader throws(MessageError) in
      (try reader.identifier(), try reader.texts("extraArguments", limit: 256))
    }
    guard Set(all.map(\.0)).count == all.count else { throw .badField("extraArguments") }
    return Dictionary(all) { $1 }
  }
}
