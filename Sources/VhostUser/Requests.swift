/// Requests of the front end to the back end, on the main socket (`VHOST_USER_*`).
public enum FrontEndRequest: UInt32, CaseIterable, Hashable, Sendable {
  case getFeatures = 1
  case setFeatures = 2
  case setOwner = 3
  case resetOwner = 4
  case setMemTable = 5
  case setLogBase = 6
  case setLogFD = 7
  case setVringNum = 8
  case setVringAddr = 9
  case setVringBase = 10
  case getVringBase = 11
  case setVringKick = 12
  case setVringCall = 13
  case setVringErr = 14
  case getProtocolFeatures = 15
  case setProtocolFeatures = 16
  case getQueueNum = 17
  case setVringEnable = 18
  case sendRARP = 19
  case netSetMTU = 20
  case setBackEndRequestFD = 21
  case iotlb = 22
  case setVringEndian = 23
  case getConfig = 24
  case setConfig = 25
  case createCryptoSession = 26
  case closeCryptoSession = 27
  case postcopyAdvise = 28
  case postcopyListen = 29
  case postcopyEnd = 30
  case getInflightFD = 31
  case setInflightFD = 32
  case gpuSetSocket = 33
  case resetDevice = 34
  case vringKick = 35
  case getMaxMemSlots = 36
  case addMemReg = 37
  case remMemReg = 38
  case setStatus = 39
  case getStatus = 40
  case getSharedObject = 41
  case setDeviceStateFD = 42
  case checkDeviceState = 43
  case getShmemConfig = 44

  /// The specification's name, for messages to people.
  public var name: String { Self.names[Int(rawValue) - 1] }

  private static let names = [
    "GET_FEATURES", "SET_FEATURES", "SET_OWNER", "RESET_OWNER", "SET_MEM_TABLE", "SET_LOG_BASE", "SET_LOG_FD",
    "SET_VRING_NUM", "SET_VRING_ADDR", "SET_VRING_BASE", "GET_VRING_BASE", "SET_VRING_KICK", "SET_VRING_CALL",
    "SET_VRING_ERR", "GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES", "GET_QUEUE_NUM", "SET_VRING_ENABLE", "SEND_RARP",
    "NET_SET_MTU", "SET_BACKEND_REQ_FD", "IOTLB_MSG", "SET_VRING_ENDIAN", "GET_CONFIG", "SET_CONFIG",
    "CREATE_CRYPTO_SESSION", "CLOSE_CRYPTO_SESSION", "POSTCOPY_ADVISE", "POSTCOPY_LISTEN", "POSTCOPY_END",
    "GET_INFLIGHT_FD", "SET_INFLIGHT_FD", "GPU_SET_SOCKET", "RESET_DEVICE", "VRING_KICK", "GET_MAX_MEM_SLOTS",
    "ADD_MEM_REG", "REM_MEM_REG", "SET_STATUS", "GET_STATUS", "GET_SHARED_OBJECT", "SET_DEVICE_STATE_FD",
    "CHECK_DEVICE_STATE", "GET_SHMEM_CONFIG",
  ]
}

/// Requests of the back end to the front end, on the socket passed by `SET_BACKEND_REQ_FD` (`VHOST_USER_BACKEND_*`).
public enum BackEndRequest: UInt32, CaseIterable, Hashable, Sendable {
  case iotlb = 1
  case configChange = 2
  case vringHostNotifier = 3
  case vringCall = 4
  case vringErr = 5
  case sharedObjectAdd = 6
  case sharedObjectRemove = 7
  case sharedObjectLookup = 8
  case shmemMap = 9
  case shmemUnmap = 10

  /// The specification's name, for messages to people.
  public var name: String { Self.names[Int(rawValue) - 1] }

  private static let names = [
    "BACKEND_IOTLB_MSG", "BACKEND_CONFIG_CHANGE_MSG", "BACKEND_VRING_HOST_NOTIFIER_MSG", "BACKEND_VRING_CALL",
    "BACKEND_VRING_ERR", "BACKEND_SHARED_OBJECT_ADD", "BACKEND_SHARED_OBJECT_REMOVE", "BACKEND_SHARED_OBJECT_LOOKUP",
    "BACKEND_SHMEM_MAP", "BACKEND_SHMEM_UNMAP",
  ]
}
