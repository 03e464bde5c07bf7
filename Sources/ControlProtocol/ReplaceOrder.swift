/// Another back end for a device of a VM that runs: `martlet ctl replace`.
///
/// Such an order names programs and files of the host, which only the spawner may open. It reads the order from the client's own
/// connection: nobody behind the walls can make one up.
package struct ReplaceOrder: Equatable, Sendable {
  /// Who is to serve the device.
  package enum Source: Equatable, Sendable {
    /// The program that serves it now, as its file is now.
    case same
    /// A program that follows our launch contract, at this path, with arguments behind those it gets from us.
    case program([String])
    /// Somebody else's, in a jail.
    case jailed([String], profile: String)
    /// Listening there.
    case socket(String)
  }

  /// The first word of the line that carries an order.
  package static let verb = "replace"
  /// How long what is in flight may take, when nothing is said.
  package static let usualDrain: UInt32 = 5000

  package var id: String
  package var source: Source
  /// Keys of `--disk`, where the disk's image changes.
  package var disk: String?
  /// Only whether it could be done.
  package var isDryRun = false
  /// Milliseconds.
  package var drain = ReplaceOrder.usualDrain

  package init(id: String, source: Source, disk: String? = nil, isDryRun: Bool = false, drain: UInt32 = ReplaceOrder.usualDrain) {
    self.id = id
    self.source = source
    self.disk = disk
    self.isDryRun = isDryRun
    self.drain = drain
  }

  // MARK: the command line

  private struct Draft: Sendable {
    var socket: String?
    var profile: String?
    var disk: String?
    var isDryRun = false
    var drain = ReplaceOrder.usualDrain
  }

  private typealias Option = OptionDescription<Draft>

  private static let table = OptionTable<Draft>([
    Option(
      "socket", .text("PATH"), group: "Replacement", summary: "a back end started by hand, listening there", example: "--socket disk.sock"
    ) { (draft, values) throws(ConfigurationError) in
      guard VMConfiguration.isSocketPath(values.text) else { throw values.badText("a socket path of 1 to 107 bytes") }
      draft.socket = values.text
    },
    Option(
      "jail", .text("FILE"), group: "Replacement", summary: "PROGRAM is somebody else's: the profile of its jail",
      example: "--jail qsd.jail"
    ) { (draft, values) throws(ConfigurationError) in
      guard VMConfiguration.isPath(values.text) else { throw values.badText("a path of 1 to 4095 bytes") }
      draft.profile = values.text
    },
    Option(
      "path", .text("FILE"), group: "Replacement", summary: "the same data elsewhere: another image for a disk", example: "--path copy.img"
    ) { (draft, values) throws(ConfigurationError) in
      guard VMConfiguration.isPath(values.text) else { throw values.badText("a path of 1 to 4095 bytes") }
      guard draft.disk == nil else { throw .conflict("--path", "--disk", remedy: "write path= among the keys of --disk") }
      draft.disk = "path=" + ListGrammar.quoted(values.text)
    },
    Option(
      "disk", .text("KEY=VALUE,..."), group: "Replacement", summary: "the same, with other keys of martlet run --disk",
      example: "--disk path=copy.img,direct=on"
    ) { (draft, values) throws(ConfigurationError) in
      guard draft.disk == nil else { throw .conflict("--path", "--disk", remedy: "write path= among the keys of --disk") }
      draft.disk = values.text
    },
    Option(
      "drain", .text("MS"), group: "Replacement", summary: "how long requests in flight may take; 5000 when left out",
      example: "--drain 500"
    ) { (draft, values) throws(ConfigurationError) in
      guard let time = Quantity.unsigned(values.text), (1...VMConfiguration.Limits.milliseconds).contains(time) else {
        throw values.badText("milliseconds from 1 to \(VMConfiguration.Limits.milliseconds)")
      }
      draft.drain = UInt32(time)
    },
    Option(
      "dry-run", .none, group: "Replacement", summary: "only say whether it could be done", example: "--dry-run"
    ) { (draft, _) throws(ConfigurationError) in draft.isDryRun = true },
  ])

  /// For `martlet ctl --help`.
  package static var optionLines: [(String, String)] {
    table.options.map { option in
      if case .text(let value) = option.shape { return ("--\(option.name) \(value)", option.summary) }
      return ("--\(option.name)", option.summary)
    }
  }

  /// Reads `DEVICE [--option value ...] [-- PROGRAM ARGUMENT ...]`.
  package init(words: [String]) throws(ConfigurationError) {
    let end = words.firstIndex(of: "--") ?? words.count
    guard let id = words[..<end].first, !id.hasPrefix("--") else {
      throw .missingOption("DEVICE", example: "martlet ctl --control P replace DEVICE -- PROGRAM ARGUMENT ...")
    }
    guard VMConfiguration.isName(id) else { throw .badValue(place: "DEVICE", value: id, expected: VMConfiguration.nameRule) }
    var draft = Draft()
    try Self.table.apply(Array(words[1..<end]), to: &draft)
    let program = Array(words[min(end + 1, words.count)...])
    if end < words.count, program.first?.isEmpty != false {
      throw .missingValue(option: "", example: "-- PROGRAM ARGUMENT ...")
    }
    self.id = id
    disk = draft.disk
    isDryRun = draft.isDryRun
    drain = draft.drain
    if let socket = draft.socket {
      if draft.profile != nil { throw .conflict("--socket", "--jail", remedy: "leave out one of them") }
      if !program.isEmpty {
        throw .conflict("--socket", "'\(program[0])'", remedy: "a back end is started by hand or here; leave out one of them")
      }
      if draft.disk != nil {
        throw .conflict("--socket", "--path", remedy: "whoever listens at the socket has its image; leave out --path")
      }
      source = .socket(socket)
    } else if let profile = draft.profile {
      guard !program.isEmpty else { throw .missingOption(" PROGRAM", example: "replace \(id) --jail \(profile) -- PROGRAM ARGUMENT ...") }
      let conventions = VMConfiguration.JailedProgram.Convention.allCases.filter { convention in
        program.contains { VMConfiguration.JailedProgram.contains($0, convention.rawValue) }
      }
      guard conventions.count == 1 else {
        throw .badValue(
          place: "-- PROGRAM", value: program.joined(separator: " "),
          expected: "exactly one of {listen}, {fd} and {socket} among its arguments, which is how it gets its connection")
      }
      source = .jailed(program, profile: profile)
    } else {
      source = program.isEmpty ? .same : .program(program)
    }
    guard program.count <= 256, !program.contains(where: { $0.utf8.contains(0) }) else {
      throw .badValue(place: "-- PROGRAM", value: program[0], expected: "at most 256 arguments")
    }
  }

  /// Paths are meant from where the client stands, and the VM stands elsewhere. A program's name without a slash is looked for as
  /// a shell would.
  package func absolute(from directory: String, find: (String) -> String?) -> ReplaceOrder {
    func whole(_ path: String) -> String { path.hasPrefix("/") ? path : directory + "/" + path }
    func program(_ words: [String]) -> [String] {
      let path = words[0].contains("/") ? whole(words[0]) : find(words[0]) ?? words[0]
      return [path] + words.dropFirst()
    }
    var result = self
    switch source {
    case .same: break
    case .program(let words): result.source = .program(program(words))
    case .jailed(let words, let profile): result.source = .jailed(program(words), profile: whole(profile))
    case .socket(let path): result.source = .socket(whole(path))
    }
    if let disk, let parts = ListGrammar.parts(of: disk) {
      result.disk = parts.map { part in
        guard let value = part.value else { return part.key }
        return part.key + "=" + ListGrammar.quoted(part.key == "path" && !value.isEmpty ? whole(value) : value)
      }.joined(separator: ",")
    }
    return result
  }

  // MARK: the line of the control socket

  /// Words with a blank between them; blanks, ends of lines and percent signs within them as `%XX`.
  package var line: String {
    var words = [Self.verb, id]
    switch source {
    case .same: break
    case .program(let program): words += ["program"] + [String(program.count)] + program
    case .jailed(let program, let profile): words += ["jail", profile, String(program.count)] + program
    case .socket(let path): words += ["socket", path]
    }
    if let disk { words += ["disk", disk] }
    if isDryRun { words.append("dry-run") }
    words += ["drain", String(drain)]
    return words.map(Self.encoded).joined(separator: " ")
  }

  package init(line: String) throws(ConfigurationError) {
    func wrong(_ word: String) -> ConfigurationError {
      .badValue(place: Self.verb, value: word, expected: "an order as martlet ctl writes it")
    }
    var words = try line.split(separator: " ", omittingEmptySubsequences: false).map { word throws(ConfigurationError) in
      guard let word = Self.decoded(String(word)) else { throw wrong(String(word)) }
      return word
    }[...]
    guard words.popFirst() == Self.verb, let id = words.popFirst(), VMConfiguration.isName(id) else { throw wrong(line) }
    self.init(id: id, source: .same)
    func program(_ words: inout ArraySlice<String>) throws(ConfigurationError) -> [String] {
      guard let count = words.popFirst().flatMap({ Int($0) }), (1...256).contains(count), words.count >= count else { throw wrong(line) }
      defer { words = words.dropFirst(count) }
      return Array(words.prefix(count))
    }
    while let word = words.popFirst() {
      switch word {
      case "program": source = .program(try program(&words))
      case "jail":
        // As with every path of an order, the client has said where it stands.
        guard let profile = words.popFirst(), profile.hasPrefix("/"), VMConfiguration.isPath(profile) else { throw wrong(line) }
        source = .jailed(try program(&words), profile: profile)
      case "socket":
        guard let path = words.popFirst(), VMConfiguration.isSocketPath(path) else { throw wrong(line) }
        source = .socket(path)
      case "disk": disk = words.popFirst()
      case "dry-run": isDryRun = true
      case "drain":
        guard let time = words.popFirst().flatMap({ UInt32($0) }), (1...UInt32(VMConfiguration.Limits.milliseconds)).contains(time) else {
          throw wrong(line)
        }
        drain = time
      default: throw wrong(word)
      }
    }
  }

  private static func encoded(_ word: String) -> String {
    guard word.utf8.contains(where: { $0 <= 0x20 || $0 == UInt8(ascii: "%") }) || word.isEmpty else { return word }
    if word.isEmpty { return "%" }
    var text = ""
    for byte in word.unicodeScalars {
      if byte.value <= 0x20 || byte == "%" {
        let digits = String(byte.value, radix: 16)
        text += "%" + (digits.utf8.count < 2 ? "0" : "") + digits
      } else {
        text.unicodeScalars.append(byte)
      }
    }
    return text
  }

  private static func decoded(_ word: String) -> String? {
    if word == "%" { return "" }
    var bytes: [UInt8] = []
    var rest = word.utf8.makeIterator()
    while let byte = rest.next() {
      guard byte == UInt8(ascii: "%") else {
        bytes.append(byte)
        continue
      }
      guard let high = rest.next().flatMap(Quantity.hexadecimalDigit), let low = rest.next().flatMap(Quantity.hexadecimalDigit) else {
        return nil
      }
      bytes.append(high << 4 | low)
    }
    return String(validating: bytes, as: UTF8.self)
  }
}

extension VMConfiguration.Disk {
  /// The same disk with another image: what the keys do not say stays as it is.
  package func with(keys text: String, cpuCount: Int) throws(ConfigurationError) -> VMConfiguration.Disk {
    guard let parts = ListGrammar.parts(of: text) else { throw .unbalanced(option: "disk", text: text) }
    for key in ["id", "num_queues", "queue_size", "on-death", "restart-limit", "vhost_user", "socket", "program", "jail", "spare"]
    where parts.contains(where: { $0.key == key }) {
      throw .conflict("replace", "\(key)=", remedy: "the guest knows the disk as it is; leave out \(key)=")
    }
    var isReadOnly = false
    if case .image(_, let readOnly) = source { isReadOnly = readOnly }
    var text = text
    if isReadOnly, !parts.contains(where: { $0.key == "readonly" }) { text += ",readonly=on" }
    let new = try VMConfiguration(arguments: ["--kernel", "none", "--cpus", "boot=\(cpuCount)", "--disk=\(text)"]).disks[0]
    var result = self
    result.source = new.source
    result.backEndArguments = new.backEndArguments
    result.isShared = new.isShared
    result.serial = new.serial ?? serial
    return result
  }
}
