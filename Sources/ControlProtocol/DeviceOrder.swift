/// One more device for a VM that runs: `add KIND KEY=VALUE,...`, in the grammar and with the checks of `martlet run`.
///
/// Such an order opens files of the host, which only the spawner may any more. It reads the order from the client's own
/// connection: nobody behind the walls can make one up.
package struct DeviceOrder: Equatable, Sendable {
  /// What can be added, by the names of `martlet ctl`.
  package enum Kind: String, CaseIterable, Sendable {
    case disk, net, console, fs, rng, generic

    /// The option of `martlet run` of the same meaning.
    package var option: String { self == .generic ? "generic-vhost-user" : rawValue }
  }

  package let kind: Kind
  package let value: String
  /// The first word of the line that carries an order.
  package static let verb = "add"

  package init(_ kind: Kind, _ value: String) {
    self.kind = kind
    self.value = value
  }

  /// Reads `KIND KEY=VALUE,...`; the value is the rest of the line, blanks and all.
  package init(words line: String) throws(ConfigurationError) {
    let words = line.split(separator: " ", maxSplits: 1, omittingEmptySubsequences: false)
    guard let kind = Kind(rawValue: words.first.map(String.init) ?? "") else {
      let word = words.first.map(String.init) ?? ""
      let names = Kind.allCases.map(\.rawValue)
      throw .unknownKind(word, nearest: EditDistance.nearest(to: word, in: names), known: names)
    }
    guard words.count == 2, !words[1].isEmpty else {
      throw .missingValue(option: kind.option, example: "add \(kind.rawValue) KEY=VALUE,...")
    }
    self.init(kind, String(words[1]))
  }

  /// The line of the control socket.
  package var line: String { "\(Self.verb) \(kind.rawValue) \(value)" }

  /// Paths are meant from where the client stands, and the VM stands elsewhere.
  package func absolute(from directory: String) -> DeviceOrder {
    guard let parts = ListGrammar.parts(of: value) else { return self }
    let paths = ["path", "socket", "src", "file", "jail"]
    guard parts.contains(where: { paths.contains($0.key) && $0.value?.utf8.first != UInt8(ascii: "/") }) else { return self }
    let text = parts.map { part in
      guard let value = part.value else { return part.key }
      let isRelative = paths.contains(part.key) && !value.isEmpty && value.utf8.first != UInt8(ascii: "/")
      return part.key + "=" + ListGrammar.quoted(isRelative ? directory + "/" + value : value)
    }
    return DeviceOrder(kind, text.joined(separator: ","))
  }
}

extension VMConfiguration {
  /// The same VM with one more device, after all checks that the whole command line would have had; and the device's id.
  package func adding(_ order: DeviceOrder) throws(ConfigurationError) -> (configuration: VMConfiguration, id: String) {
    var draft = Draft()
    draft.result = self
    draft.hasKernel = true
    draft.console = console
    draft.serial = serial
    try Self.addTable.apply(["--\(order.kind.option)=\(order.value)"], to: &draft)
    var result = try draft.finish()
    let known = Set(deviceIDs)
    guard let id = result.deviceIDs.first(where: { !known.contains($0) }) else {
      throw .conflict("'\(order.value)'", "the VM's devices", remedy: "name one device")
    }
    let isNamed = ListGrammar.parts(of: order.value)?.contains { $0.key == "id" } == true
    result.changes.append(.init(id: id, step: .added(DeviceOrder(order.kind, isNamed ? order.value : "\(order.value),id=\(id)"))))
    return (result, id)
  }

  /// The same VM without the device.
  package func removing(_ id: String) -> VMConfiguration {
    var result = self
    result.disks.removeAll { $0.id == id }
    result.nets.removeAll { $0.id == id }
    result.fileSystems.removeAll { $0.id == id }
    result.generics.removeAll { $0.id == id }
    result.consoles.removeAll { $0.id == id }
    if result.entropy?.id == id { result.entropy = nil }
    result.limits[id] = nil
    if id == Reserved.console { result.console = .off }
    let hasBeenAdded = changes.contains { $0.id == id && $0.isAddition }
    result.changes.removeAll { $0.id == id && $0.step != .removed }
    if !hasBeenAdded, deviceIDs.contains(id) { result.changes.append(.init(id: id, step: .removed)) }
    return result
  }

  package var deviceIDs: [String] {
    let others = disks.map(\.id) + nets.map(\.id) + fileSystems.map(\.id) + generics.map(\.id) + consoles.map(\.id)
    return others + (entropy.map { [$0.id] } ?? []) + (console == .off ? [] : [Reserved.console])
  }
}
