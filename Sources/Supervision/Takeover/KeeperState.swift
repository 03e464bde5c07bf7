import ControlProtocol
import HostSystem
import Sandbox

/// What a keeper hands on to the program that it becomes. It comes from its own memory, which no supervisor can write to, but for
/// the ends of processes.
struct KeeperState: HandedOnState {
  struct End {
    var process: Int32
    var code: Int32
    var status: Int32
  }

  /// "MLKP"
  static let magic: UInt32 = 0x504B_4C4D
  /// Raised when either of them changes its shape: the one that is examined stands for both.
  static let version = SupervisorState.version
  static let limit = 1 << 20

  /// Those of `martlet run`.
  var arguments: [String] = []
  var userID: UInt32 = 0
  var mode = WallMode.on
  var namespaces: Namespaces = []
  var identityBase: UInt32?
  /// Where the programs are.
  var directory = ""
  /// Descriptors that were there when the first program started.
  var inherited: [CInt] = []
  /// A signal that the supervisor may not have taken notice of, or 0.
  var signal: Int32 = 0
  /// How processes have ended, for whoever has not asked yet.
  var ends: [End] = []

  func encode() -> [UInt8] {
    var writer = Self.begin()
    writer.texts(arguments)
    writer.number(userID)
    writer.text(mode.rawValue)
    writer.number(namespaces.rawValue)
    writer.optional(identityBase) { $0.number($1) }
    writer.text(directory)
    writer.list(inherited) { $0.number($1) }
    writer.number(signal)
    writer.list(ends) { writer, end in
      writer.number(end.process)
      writer.number(end.code)
      writer.number(end.status)
    }
    return writer.bytes
  }

  init() {}

  init(from reader: inout WireReader) throws(MessageError) {
    arguments = try reader.texts("arguments", limit: 1024)
    userID = try reader.number()
    guard let mode = WallMode(rawValue: try reader.text("mode", limit: 8)) else { throw .badField("mode") }
    self.mode = mode
    namespaces = Namespaces(rawValue: try reader.number())
    identityBase = try reader.identityBase()
    directory = try reader.text("directory")
    inherited = try reader.list("inherited", limit: Int(TakeoverWork.numberLimit)) { reader throws(MessageError) in
      try reader.descriptor("inherited")
    }
    signal = Int32(bitPattern: try reader.number())
    ends = try reader.list("ends", limit: 4096) { reader throws(MessageError) in
      End(
        process: Int32(bitPattern: try reader.number()), code: Int32(bitPattern: try reader.number()),
        status: Int32(bitPattern: try reader.number()))
    }
  }
}
