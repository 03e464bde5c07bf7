import ControlProtocol
import Glibc
import HostSystem
import Sandbox

/// What a spawner remembers, as its successor gets it. It comes from the spawner and never from the supervisor, whose word
/// for what may be started would be worth nothing once it has been taken over.
struct SpawnerState: HandedOnState {
  static let version: UInt16 = 1
  /// "MLSP"
  static let magic: UInt32 = 0x5053_4C4D
  static let limit = 1 << 20

  struct Launch {
    var id: String
    var program: String
    var launch: ChildLaunch
  }

  struct Jailed {
    var id: String
    var identity: ChildIdentity?
    /// The process that runs, 0 for none.
    var processID: UInt32
  }

  /// Which file it is.
  struct FileNumbers {
    var device: UInt64
    var inode: UInt64

    init(_ status: FileStatus) {
      device = status.device
      inode = status.inode
    }

    init(_ reader: inout WireReader) throws(MessageError) {
      device = try reader.number()
      inode = try reader.number()
    }

    func write(_ writer: inout WireWriter) {
      writer.number(device)
      writer.number(inode)
    }

    var status: FileStatus { FileStatus(device: device, inode: inode) }
  }

  /// A file as it was when it was opened first.
  struct File {
    var path: String
    var numbers: FileNumbers
  }

  /// A device of a program of ours.
  struct Own {
    var id: String
    var program: String
    var arguments: [String]
    var isOnTerminal: Bool
    var resourceCount: UInt8
    var image: Image?
  }

  struct Image {
    var readOnly: Bool
    var isShared: Bool
    var file: File
  }

  /// The socket of a device that was added while the VM ran.
  struct Added {
    var id: String
    var file: File
  }

  /// An image that the VM owns; who has the open file.
  struct Claim {
    var disk: String
    /// The spawner: it is the next of the descriptors behind the agreed ones.
    var isHeld: Bool
    /// Which file it is, where that is known.
    var file: FileNumbers?
  }

  /// The disk below an image, for the limits of its transfers.
  struct Storage {
    var id: String
    var major: UInt32
    var minor: UInt32
  }

  struct External {
    var id: String
    var path: String
  }

  var arguments: [String] = []
  var changes: [DeviceChange] = []
  var extraArguments: [String: [String]] = [:]
  /// The filter of the supervisor, for those who stand in for it, and the number that its exec needs.
  var rules: [SystemCallRule] = []
  var cookie: UInt64 = 0
  var userID: UInt32 = 0
  var mode = WallMode.on
  var namespaces: Namespaces = []
  var identityBase: UInt32?
  var identitiesUsed: UInt32 = 0
  var directory = ""
  var launches: [Launch] = []
  var jailed: [Jailed] = []
  var assignments: [DeviceAssignment] = []
  var own: [Own] = []
  var claims: [Claim] = []
  var externals: [External] = []
  /// What the guardian puts right.
  var hasGuardian = false
  var isOnTerminal = false
  var settings: [UInt8] = []
  var files: [File] = []
  var added: [Added] = []
  var groups: ControlGroups.Known?
  var storage: [Storage] = []

  func encode() -> [UInt8] {
    var writer = Self.begin()
    writer.texts(arguments)
    writer.changes(changes)
    writer.extraArguments(extraArguments)
    writer.rules(rules)
    writer.number(cookie)
    writer.number(userID)
    writer.text(mode.rawValue)
    writer.number(namespaces.rawValue)
    writer.optional(identityBase) { $0.number($1) }
    writer.number(identitiesUsed)
    writer.text(directory)
    writer.list(launches) { writer, known in
      writer.text(known.id)
      writer.text(known.program)
      writer.texts(known.launch.arguments)
      writer.optional(known.launch.identity) { $0.identity($1) }
      writer.number(known.launch.fileLimit)
      writer.optional(known.launch.threadLimit) { $0.number($1) }
      writer.number(known.launch.namespaces.rawValue)
      writer.number(UInt8(truncatingIfNeeded: known.launch.parentDeathSignal))
    }
    writer.list(jailed) { writer, known in
      writer.text(known.id)
      writer.optional(known.identity) { $0.identity($1) }
      writer.number(known.processID)
    }
    func write(_ file: File, _ writer: inout WireWriter) {
      writer.text(file.path)
      file.numbers.write(&writer)
    }
    writer.list(assignments) { $0.packet(SupervisorMessage.device($1).encode(sequence: 0)) }
    writer.list(own) { writer, own in
      writer.text(own.id)
      writer.text(own.program)
      writer.texts(own.arguments)
      writer.flag(own.isOnTerminal)
      writer.number(own.resourceCount)
      writer.optional(own.image) { writer, image in
        writer.flag(image.readOnly)
        writer.flag(image.isShared)
        write(image.file, &writer)
      }
    }
    writer.list(claims) { writer, claim in
      writer.text(claim.disk)
      writer.flag(claim.isHeld)
      writer.optional(claim.file) { $1.write(&$0) }
    }
    writer.list(externals) { writer, external in
      writer.text(external.id)
      writer.text(external.path)
    }
    writer.flag(hasGuardian)
    writer.flag(isOnTerminal)
    writer.packet(settings)
    writer.list(files) { write($1, &$0) }
    writer.list(added) { writer, added in
      writer.text(added.id)
      write(added.file, &writer)
    }
    writer.groups(groups)
    writer.list(storage) { writer, storage in
      writer.text(storage.id)
      writer.number(storage.major)
      writer.number(storage.minor)
    }
    return writer.bytes
  }

  init() {}

  init(from reader: inout WireReader) throws(MessageError) {
    arguments = try reader.texts("arguments", limit: 1024)
    changes = try reader.changes()
    extraArguments = try reader.extraArguments()
    rules = try reader.rules("rules")
    cookie = try reader.number()
    userID = try reader.number()
    guard let mode = WallMode(rawValue: try reader.text("mode", limit: 8)) else { throw .badField("mode") }
    self.mode = mode
    namespaces = Namespaces(rawValue: try reader.number())
    identityBase = try reader.identityBase()
    identitiesUsed = try reader.number()
    guard identitiesUsed <= Identities.perVM else { throw .badField("identities") }
    directory = try reader.text("directory")
    launches = try reader.list("launches", limit: 256) { reader throws(MessageError) in
      let id = try reader.identifier()
      let program = try reader.text("program", limit: 64)
      var launch = ChildLaunch(arguments: try reader.texts("arguments", limit: 256), descriptors: [])
      launch.identity = try reader.optional("identity") { reader throws(MessageError) in try reader.identity() }
      launch.fileLimit = try reader.number()
      launch.threadLimit = try reader.optional("threadLimit") { reader throws(MessageError) in try reader.number() }
      launch.namespaces = Namespaces(rawValue: try reader.number())
      launch.parentDeathSignal = CInt(try reader.number(UInt8.self))
      return Launch(id: id, program: program, launch: launch)
    }
    jailed = try reader.list("jailed", limit: 256) { reader throws(MessageError) in
      let id = try reader.identifier()
      let identity = try reader.optional("identity") { reader throws(MessageError) in try reader.identity() }
      let processID = try reader.number(UInt32.self)
      guard processID <= UInt32(Int32.max) else { throw .badField("process") }
      return Jailed(id: id, identity: identity, processID: processID)
    }
    func file(_ reader: inout WireReader) throws(MessageError) -> File {
      File(path: try reader.text("file"), numbers: try FileNumbers(&reader))
    }
    assignments = try reader.list("assignments", limit: 31) { reader throws(MessageError) in
      guard case .device(let device) = try SupervisorMessage.decode(reader.packet("assignments"), descriptorCount: 1).message else {
        throw .badField("assignments")
      }
      return device
    }
    own = try reader.list("own", limit: 256) { reader throws(MessageError) in
      let id = try reader.identifier()
      let program = try reader.text("program")
      let arguments = try reader.texts("arguments", limit: 256)
      let isOnTerminal = try reader.flag("isOnTerminal")
      let resourceCount: UInt8 = try reader.number()
      let image = try reader.optional("image") { reader throws(MessageError) in
        Image(readOnly: try reader.flag("image"), isShared: try reader.flag("image"), file: try file(&reader))
      }
      return Own(
        id: id, program: program, arguments: arguments, isOnTerminal: isOnTerminal, resourceCount: resourceCount, image: image)
    }
    claims = try reader.list("claims", limit: 256) { reader throws(MessageError) in
      Claim(
        disk: try reader.identifier(), isHeld: try reader.flag("claims"),
        file: try reader.optional("claims") { reader throws(MessageError) in try FileNumbers(&reader) })
    }
    externals = try reader.list("externals", limit: 256) { reader throws(MessageError) in
      External(id: try reader.identifier(), path: try reader.text("path"))
    }
    hasGuardian = try reader.flag("guardian")
    isOnTerminal = try reader.flag("terminal")
    settings = try reader.packet("settings", limit: 256)
    guard settings.count == MemoryLayout<termios>.size else { throw .badField("settings") }
    files = try reader.list("files", limit: 16) { reader throws(MessageError) in try file(&reader) }
    added = try reader.list("added", limit: 256) { reader throws(MessageError) in
      Added(id: try reader.identifier(), file: try file(&reader))
    }
    groups = try reader.groups()
    storage = try reader.list("storage", limit: 256) { reader throws(MessageError) in
      Storage(id: try reader.identifier(), major: try reader.number(), minor: try reader.number())
    }
  }
}
